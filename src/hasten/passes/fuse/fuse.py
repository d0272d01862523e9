"""The pass: put `FusedForward` before a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.families.family import Family
from hasten.families.modulations import Modulations, RowReader
from hasten.passes.applied import Applied
from hasten.passes.fuse.constants import ConstantsOfRuns
from hasten.passes.fuse.forward import Body, FusedForward
from hasten.recipe import Fuse
from hasten.step.scheduler import scheduler_of

__all__ = ["Attention", "fuse_forward"]

NAMES = {torch.float8_e4m3fn: "FP8", torch.int8: "int8"}


class Attention(Protocol):
    """The chosen attention: called by the kernels, followed by the original blocks."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """B×L×heads×head_dim."""

    def prepare(self, latents: Tensor, text: Tensor) -> None:
        """Before the original blocks run on these latents (B×S×C) and this text (B×T×D)."""


def fuse_forward(
    pipe: Any, family: Family, recipe: Fuse, attend: Attention, declined: str | None
) -> tuple[Applied, FusedForward]:
    """Replace the transformer's forward; only this instance is changed.

    declined: why other sections of the recipe leave the blocks to others, if they do. Raises
    UnsupportedError where kernels = "on" and the blocks cannot run on them.
    """
    transformer = pipe.transformer
    reasons = _reasons(transformer, family, recipe, declined)
    if recipe.kernels == "on" and reasons:
        raise UnsupportedError(
            f'fuse.kernels = "on": {reasons[0]}', 'set fuse.kernels = "auto", or "off"'
        )
    modulations = Modulations(family.modulated_norms(transformer))
    constants = ConstantsOfRuns(
        transformer, family, modulations, scheduler_of(pipe), whole_run=recipe.conditioning
    )
    table = (
        f"modulations of {'all steps in one table' if recipe.conditioning else 'a step at once'}"
    )
    body: Body
    changed: Callable[[], str | None] = _never
    if reasons:
        body, put_back = _on_the_blocks(transformer, family, modulations, attend)
        what = "original blocks"
    else:
        fused = family.fused(transformer, modulations, attend)
        body, put_back, changed = fused, _nothing, fused.changed
        kinds = [NAMES[codes] for codes in NAMES if codes in fused.codes] or ["unquantised"]
        what = f"fused kernels, {' and '.join(kinds)} products"
    forward = FusedForward(transformer, family, constants, body, transformer.forward, changed)
    undo_forward = forward.put_in_place()

    def undo() -> None:
        put_back()
        undo_forward()

    def live() -> str:
        line = f"held at most {constants.peak_bytes / 2**20:.1f} MiB of constants"
        declined = "; ".join(
            f"{n} calls with {why} ran unfused" for why, n in forward.declined.items()
        )
        return f"{line}; {declined}" if declined else line

    return (
        Applied(
            name="fuse",
            what=f"{table}; {what}",
            undo=undo,
            left_alone=tuple(("the blocks", reason) for reason in reasons[:1]),
            declined=recipe.kernels == "auto" and bool(reasons),
            live=live,
        ),
        forward,
    )


def _reasons(transformer: Any, family: Family, recipe: Fuse, declined: str | None) -> list[str]:
    """Why the blocks stay as they are; empty where they will run on the kernels."""
    if recipe.kernels == "off":
        return ['kernels = "off"']
    return [declined] if declined else list(family.reasons_against_kernels(transformer))


def _never() -> None:
    return None


def _nothing() -> None:
    """Merged weights stay merged: the layers' own are views of them."""


def _on_the_blocks(
    transformer: Any, family: Family, modulations: Modulations, attend: Attention
) -> tuple[Body, Callable[[], None]]:
    """The body over the transformer's own blocks, whose modulation linears read the row."""
    readers = []
    originals: list[Any] = [norm.linear for _, norm in modulations.norms]
    for name, norm in modulations.norms:
        reader = RowReader(norm.linear, modulations.start[name])
        norm.linear = reader
        readers.append(reader)

    def body(latents: Tensor, text: Tensor, row: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attend.prepare(latents, text)
        with RowReader.reading(readers, row):
            state = family.state(transformer, latents, text, row, (cos, sin))
            for _, after in family.blocks(transformer, state):
                state = after
            velocity: Tensor = family.epilogue(transformer, state)
            return velocity

    def put_back() -> None:
        for (_, norm), linear in zip(modulations.norms, originals, strict=True):
            norm.linear = linear

    return body, put_back
