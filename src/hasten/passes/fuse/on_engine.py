"""Run the blocks on an engine: an exported graph in their place, fed by the conditioning table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from hasten.errors import CallError
from hasten.families.family import Family
from hasten.families.modulations import Modulations
from hasten.passes.applied import Applied
from hasten.passes.fuse.constants import ConstantsOfRuns
from hasten.passes.fuse.forward import Body, FusedForward
from hasten.step.scheduler import scheduler_of

__all__ = ["run_on_engine"]

WEIGHTS_ARE_GONE = "the transformer let its blocks' weights go (engine.release = true)"


def run_on_engine(
    pipe: Any,
    family: Family,
    body: Body,
    what: str,
    *,
    close: Callable[[], None],
    release: bool = False,
) -> Applied:
    """Replace the transformer's forward by the engine's body; only this instance is changed.

    what: a line about the engine; close: frees it. With `release` the torch weights of the blocks
    are let go for good, all but the modulations, which the table is made of.
    """
    transformer = pipe.transformer
    modulations = Modulations(family.modulated_norms(transformer))
    constants = ConstantsOfRuns(transformer, family, modulations, scheduler_of(pipe))
    freed = _release(transformer, family) if release else 0
    if release:  # a file of empty weights would look like a model
        transformer.save_pretrained = _no_weights_to_save
    changed = _watch(transformer, family)
    forward = FusedForward(transformer, family, constants, body, _beyond_the_engine, changed)
    undo_forward = forward.put_in_place()

    def undo() -> None:
        undo_forward()
        close()
        if release:
            transformer.forward = _no_weights_to_run

    released = f"; {freed / 2**20:.1f} MiB of the blocks' torch weights let go" if release else ""
    return Applied(
        name="engine",
        what=f"{what}; modulations of all steps in one table{released}",
        undo=undo,
        cannot_undo=WEIGHTS_ARE_GONE if release else "",
    )


def _beyond_the_engine(*_: Any, **__: Any) -> NoReturn:
    raise CallError(
        "the engine cannot take ControlNet residuals or IP-Adapter embeddings",
        "leave [engine] out of the recipe for such calls",
    )


def _no_weights_to_save(*_: Any, **__: Any) -> NoReturn:
    raise CallError(
        f"{WEIGHTS_ARE_GONE}, so it cannot be saved", "save the pipeline before it is optimised"
    )


def _no_weights_to_run(*_: Any, **__: Any) -> NoReturn:
    raise CallError(f"{WEIGHTS_ARE_GONE}, so it cannot run", "load the pipeline again")


def _watch(transformer: nn.Module, family: Family) -> Callable[[], str | None]:
    """Names a parameter that was changed or replaced since: the engine holds the values of then.

    The modulations are not in the engine, and `[offload]` moves them.
    """
    outside = tuple(f"{name}.linear." for name, _ in family.modulated_norms(transformer))

    def state() -> dict[str, tuple[int, int]]:
        return {
            name: (id(parameter), parameter._version)
            for name, parameter in transformer.named_parameters()
            if not name.startswith(outside)
        }

    before = state()

    def changed() -> str | None:
        now = state()
        names = [name for name in (*before, *now) if before.get(name) != now.get(name)]
        return names[0] if names else None

    return changed


def _release(transformer: Any, family: Family) -> int:
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
