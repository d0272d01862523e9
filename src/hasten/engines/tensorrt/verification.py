"""How far an exported graph lies from torch, as it is kept in the manifest. No torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["SizeErrors", "Verification"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SizeErrors(_Record):
    """Relative errors at one size, in height × width image tokens.

    whole: the graph against torch, each by itself from the inputs to the velocity. blocks: by name,
    the larger one of a block's outputs, where torch's block was fed what the graph's block before
    it gave. Of fp8 alone: control, torch against itself with its latents moved by 2^-20, and
    unquantised, the graph against the model in float32.
    """

    height: int
    width: int
    whole: float
    blocks: dict[str, float]
    control: float | None = None
    unquantised: float | None = None

    @property
    def furthest(self) -> str:
        """The block that lies furthest off."""
        return max(self.blocks, key=self.blocks.__getitem__)


class Verification(_Record):
    """What was compared, how far apart it lay and how far it may. No `whole_bar`: the whole is not
    held to anything."""

    what: str
    whole_bar: float | None
    block_bar: float
    sizes: tuple[SizeErrors, ...]
    seconds: float

    @property
    def worst_whole(self) -> float:
        """The largest error of the whole graph at any size."""
        return max(size.whole for size in self.sizes)

    @property
    def worst_block(self) -> float:
        """The largest error of a block at any size."""
        return max(size.blocks[size.furthest] for size in self.sizes)
