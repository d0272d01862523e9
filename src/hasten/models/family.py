"""What the engine needs to know of a model family, and which family a pipeline belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from hasten.errors import UnsupportedError
from hasten.models.flux import FluxFamily

__all__ = ["Family", "family_of"]


class Family(Protocol):
    """The seam between the engine and one architecture."""

    name: str

    @property
    def prologue(self) -> Callable[..., Any]:
        """(transformer, **inputs of its forward) -> the state before the first block."""

    def blocks(self, transformer: Any, state: Any) -> Iterator[tuple[str, Any]]:
        """Run the blocks one by one, yielding (block name, state after it)."""

    def epilogue(self, transformer: Any, state: Any) -> Tensor:
        """Everything after the last block: the model's output."""

    def through(
        self,
        transformer: Any,
        middle: Callable[[Any], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The model's output for a call of its forward, with `middle` in place of its blocks."""

    def repeated_blocks(self, transformer: Any) -> list[tuple[str, nn.Module]]:
        """The repeated blocks by name, in the order in which they run."""


FAMILIES: dict[str, Family] = {"FluxTransformer2DModel": FluxFamily()}


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, by its transformer's class."""
    transformer = getattr(pipe, "transformer", None)
    name = type(transformer).__name__
    if name in FAMILIES:
        return FAMILIES[name]
    what = f"its transformer is a {name}" if transformer is not None else "it has no transformer"
    raise UnsupportedError(
        f"{type(pipe).__name__} is of no supported family: {what}",
        f"families supported: {', '.join(FAMILIES)}",
    )
