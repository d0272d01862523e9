"""The `[engine]` pass: an exported graph replaces the blocks; a table holds its modulations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn

from torch import nn

from hasten.errors import CallError
from hasten.families.family import Family
from hasten.step.applied import Applied, Replaced, replace_attribute
from hasten.step.call import Inner, Output, StepCall
from hasten.step.chain import StepChain
from hasten.step.constants import Body, ConstantsLayer
from hasten.step.modulations import Modulations
from hasten.step.protocols import Transformer

WEIGHTS_ARE_GONE = (
    "the torch weights of the transformer's blocks were freed (engine.release = true)"
)


class EngineLayer:
    """Runs the engine on every call; calls that it does not support raise CallError."""

    name = "body"

    def __init__(self, body: Body) -> None:
        self.body = body

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        if len(call.constants) < 2:
            raise CallError(
                "the engine cannot take ControlNet residuals or IP-Adapter embeddings",
                "use a recipe without [engine] for such calls",
            )
        velocity = self.body(call.latents, **call.constants)
        return Output.of_sample(velocity, return_dict=call.return_dict)

    def live(self) -> str:
        return ""


class WithoutWeights:
    """Rejects calls of a transformer whose block weights were freed."""

    name = "body"

    def __call__(self, call: StepCall, inner: Inner) -> NoReturn:
        raise CallError(f"{WEIGHTS_ARE_GONE}, so it cannot run", "load the pipeline again")

    def live(self) -> str:
        return ""


def run_on_engine(
    chain: StepChain,
    family: Family,
    body: Body,
    description: str,
    *,
    close: Callable[[], None],
    release: bool = False,
) -> Applied:
    """Replace a transformer's forward by an engine.

    Args:
        chain: The transformer's chain.
        family: A family with `conditioning` and `split`.
        body: The engine.
        description: One line about the engine.
        close: Frees the engine.
        release: Permanently free the torch weights of the blocks, except the modulations, from
            which the table is computed.
    """
    transformer = chain.transformer
    modulations = Modulations(family.modulated_norms(transformer))
    freed = _release(transformer, family) if release else 0
    saving: Replaced | None = None
    if release:  # a saved file of empty weights would look like a model
        saving = replace_attribute(transformer, "save_pretrained", _no_weights_to_save)
    watch = _Watch(transformer, family)
    assert family.conditioning is not None  # `check` rejects families without it
    chain.push(
        ConstantsLayer(
            transformer, family.conditioning, modulations, family.split, changed=watch.changed
        )
    )
    chain.push(EngineLayer(body))
    released = f"; {freed / 2**20:.1f} MiB of the blocks' torch weights freed" if release else ""
    return Applied(
        name="engine",
        description=f"{description}; modulations of all steps in one table{released}",
        undo=partial(_undo, chain, close, saving),
        cannot_undo=WEIGHTS_ARE_GONE if release else "",
    )


def _undo(chain: StepChain, close: Callable[[], None], saving: Replaced | None) -> None:
    chain.remove("constants")
    chain.remove("body")
    close()
    if saving is not None:
        chain.push(WithoutWeights())


def _no_weights_to_save(*_: object, **__: object) -> NoReturn:
    raise CallError(
        f"{WEIGHTS_ARE_GONE}, so it cannot be saved", "save the pipeline before it is optimised"
    )


class _Watch:
    """Detects parameters that changed after the export: the engine still has the old values.

    Modulations are ignored: they are not part of the engine, and `[offload]` moves them.
    """

    def __init__(self, transformer: Transformer, family: Family) -> None:
        self.transformer = transformer
        self.outside = tuple(f"{name}.linear." for name, _ in family.modulated_norms(transformer))
        self.before = self._state()

    def changed(self) -> str | None:
        now = self._state()
        names = [name for name in (*self.before, *now) if self.before.get(name) != now.get(name)]
        return names[0] if names else None

    def _state(self) -> dict[str, tuple[int, int]]:
        return {
            name: (id(parameter), parameter._version)
            for name, parameter in self.transformer.named_parameters()
            if not name.startswith(self.outside)
        }


def _release(transformer: Transformer, family: Family) -> int:
    """Free the blocks' weights, except their modulation linears; return the number of bytes.

    Empty parameters, unlike torch's meta tensors, still work with `pipe.to(device)`.
    """
    kept = {id(norm.linear) for _, norm in family.modulated_norms(transformer)}
    freed = 0
    for _, block in family.repeated_blocks(transformer):
        for module in block.modules():
            if id(module) in kept:
                continue
            for name, parameter in list(module.named_parameters(recurse=False)):
                freed += parameter.nbytes
                empty = parameter.new_empty(0)
                setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
    return freed
