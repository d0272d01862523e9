"""What the engine needs to know of a model family, and which family a pipeline belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from hasten.errors import UnsupportedError
from hasten.families.flux1.blocks import FluxFamily
from hasten.families.flux1.fused import Attend
from hasten.families.modulations import Modulations

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

    @property
    def conditioning(self) -> Callable[..., Tensor]:
        """(transformer, timesteps, guidance, pooled, dtype) -> what the modulations are made of."""

    @property
    def state(self) -> Callable[..., Any]:
        """(transformer, latents, text, conditioning, rotary) -> the state before the first block,
        where all but the latents is embedded."""

    def rotary(self, transformer: Any, txt_ids: Tensor, img_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every token's position, text first: tokens × head_dim each."""

    def inputs(
        self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the model's forward by name."""

    def scaled(
        self, transformer: Any, function: Callable[..., Tensor], inputs: dict[str, Any]
    ) -> Tensor:
        """`function(transformer, **inputs)` under the LoRA scale that `inputs` name."""

    def modulated_norms(self, transformer: Any) -> list[tuple[str, Any]]:
        """Norms with a modulation linear by name, in the order in which they run."""

    def reasons_against_kernels(
        self, transformer: Any, to_be: Mapping[nn.Module, type] = MappingProxyType({})
    ) -> list[str]:
        """Why the blocks cannot run on the fused kernels, once these linears are FP8; empty where
        they can."""

    def fused(self, transformer: Any, modulations: Modulations, attend: Attend) -> Any:
        """The blocks on fused kernels: (latents, text, row, cos, sin) -> velocity; `changed` says
        what was replaced since, `codes` of which dtypes its products are, empty where all are
        plain."""

    def quantizable(self, transformer: Any) -> list[tuple[str, nn.Linear]]:
        """Linears that may be quantised, by name: (name in the transformer, linear)."""


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
