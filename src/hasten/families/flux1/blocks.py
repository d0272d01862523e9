"""FLUX.1's step from embedded inputs to velocity, block by block, for the export of engines.

The transformer's own forward is what runs everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.families.flux1.conditioning import embed_conditioning, rotary
from hasten.step.protocols import Transformer

__all__ = ["FluxBlocks", "FluxState"]


@dataclass(frozen=True)
class FluxState:
    """What flows between the blocks.

    Attributes:
        image: B×S×D tokens.
        text: B×T×D tokens.
        conditioning: B×D: timestep, guidance and pooled text.
        rotary: cos and sin, (T+S)×head_dim each.
    """

    image: Tensor
    text: Tensor
    conditioning: Tensor
    rotary: tuple[Tensor, Tensor]


class FluxBlocks:
    """The parts of a step, over the transformer's own modules."""

    def state(
        self,
        transformer: Transformer,
        latents: Tensor,
        text: Tensor,
        conditioning: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> FluxState:
        """The state before the first block: latents are B×S×C, the rest is embedded already."""
        return FluxState(transformer.x_embedder(latents), text, conditioning, rotary)

    def blocks(self, transformer: Transformer, state: FluxState) -> Iterator[tuple[str, FluxState]]:
        """Run the double-stream, then the single-stream blocks; yield the state after each."""
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for index, block in enumerate(getattr(transformer, name)):
                text, image = block(
                    hidden_states=state.image,
                    encoder_hidden_states=state.text,
                    temb=state.conditioning,
                    image_rotary_emb=state.rotary,
                )
                state = replace(state, image=image, text=text)
                yield f"{name}.{index}", state

    def epilogue(self, transformer: Transformer, state: FluxState) -> Tensor:
        """Modulated output norm and projection: the velocity, B×S×C."""
        output: Tensor = transformer.proj_out(transformer.norm_out(state.image, state.conditioning))
        return output

    def conditioning(
        self,
        transformer: Transformer,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled_projections: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """See `embed_conditioning`."""
        return embed_conditioning(transformer, timestep, guidance, pooled_projections, dtype)

    def rotary(
        self, transformer: Transformer, txt_ids: Tensor, img_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `rotary`."""
        return rotary(transformer, txt_ids, img_ids)
