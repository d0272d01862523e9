"""[engine]: an exported graph in the place of the blocks, with rows from the conditioning table."""

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
    """Runs the engine on every call; there is no other forward for those that it cannot take."""

    name = "body"

    def __init__(self, body: Body) -> None:
        self.body = body

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        if len(call.constants) < 2:
            raise CallError(
                "the engine cannot take ControlNet residuals or IP-Adapter embeddings",
                "leave [engine] out of the recipe for such calls",
            )
        velocity = self.body(call.latents, **call.constants)
        return Output.of_sample(velocity, return_dict=call.return_dict)

    def live(self) -> str:
        return ""


class WithoutWeights:
    """Refuses calls of a transformer whose blocks have no weights any more."""

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
    """Put an engine before a transformer's forward.

    Args:
        chain: The transformer's.
        family: With `conditioning` and `split`.
        body: The engine.
        what: A line about it.
        close: Frees it.
        release: Free the torch weights of the blocks for good, all but the modulations, which the
            table is made of.
    """
    transformer = chain.transformer
    modulations = Modulations(family.modulated_norms(transformer))
    freed = _release(transformer, family) if release else 0
    saving: Replaced | None = None
    if release:  # a file of empty weights would look like a model
        saving = replace_attribute(transformer, "save_pretrained", _no_weights_to_save)
    watch = _Watch(transformer, family)
    assert family.conditioning is not None  # `check` has refused families without it
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
    """Names a parameter that was changed or replaced since: the engine holds the values of then.

    The modulations are not in the engine, and `[offload]` moves them.
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
    """Leave the blocks empty, all but their modulation linears; returns the bytes that were there.

    Empty parameters, unlike torch's meta ones, still follow `pipe.to(device)`.
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
