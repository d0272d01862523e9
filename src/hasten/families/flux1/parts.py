"""Parts of FLUX.1's forward: conditioning, constants of a run, blocks, latents, text.

Pipelines run the transformer's own forward; engines are exported from these parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.step.protocols import Pipeline, Transformer


def modulated_norms(transformer: Transformer) -> list[tuple[str, nn.Module]]:
    """(name, norm) of every norm with a modulation linear, in execution order."""
    norms: list[tuple[str, nn.Module]] = []
    for index, block in enumerate(transformer.transformer_blocks):
        norms.append((f"transformer_blocks.{index}.norm1", block.norm1))
        norms.append((f"transformer_blocks.{index}.norm1_context", block.norm1_context))
    for index, block in enumerate(transformer.single_transformer_blocks):
        norms.append((f"single_transformer_blocks.{index}.norm", block.norm))
    return [*norms, ("norm_out", transformer.norm_out)]


def rows(
    transformer: Transformer, inputs: Mapping[str, Any], timesteps: Tensor, dtype: torch.dtype
) -> Tensor:
    """The conditioning vectors R×D of a call's inputs at R timesteps; see `Conditioning.rows`."""
    batch = len(inputs["timestep"])
    steps = len(timesteps) // batch
    guidance = inputs.get("guidance")
    return embed_conditioning(
        transformer,
        timesteps,
        None if guidance is None else guidance.expand(batch).repeat(steps),
        inputs["pooled_projections"].expand(batch, -1).repeat(steps, 1),
        dtype,
    )


def embed_conditioning(
    transformer: Transformer,
    timestep: Tensor,
    guidance: Tensor | None,
    pooled_projections: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Embed the conditioning inputs.

    Timestep and guidance are rounded to `dtype` and multiplied by 1000 before the embedding.

    Args:
        transformer: The transformer.
        timestep: R timesteps in [0, 1].
        guidance: R guidance scales, or None.
        pooled_projections: Pooled text, R×pooled_dim.
        dtype: The latents' dtype.

    Returns:
        R×D.
    """
    moments = [timestep.to(dtype) * 1000]
    if guidance is not None:
        moments.append(guidance.to(dtype) * 1000)
    embedded: Tensor = transformer.time_text_embed(*moments, pooled_projections)
    return embedded


def rotary(transformer: Transformer, txt_ids: Tensor, img_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (T+S)×head_dim each in float32, from T×3 and S×3 positions."""
    ids = [ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids)]
    cos, sin = transformer.pos_embed(torch.cat(ids))
    return cos, sin


def embedded(transformer: Transformer, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The constants of a body besides the row: text, B×T×D; cos and sin, (T+S)×head_dim."""
    cos, sin = rotary(transformer, inputs["txt_ids"], inputs["img_ids"])
    text = transformer.context_embedder(inputs["encoder_hidden_states"])
    return {"text": text, "cos": cos, "sin": sin}


def decode(pipe: Pipeline, latents: Tensor, height: int, width: int) -> Tensor:
    """Decode packed latents (P×tokens×channels) to images, P×3×height×width in [-1, 1]."""
    unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    config = pipe.vae.config
    pictures: Tensor = pipe.vae.decode(
        unpacked / config.scaling_factor + config.shift_factor, return_dict=False
    )[0]
    return pictures


@torch.no_grad()
def encode(pipe: Pipeline, prompt: str, max_sequence_length: int) -> dict[str, Any]:
    """Encode a prompt with T5 and CLIP; return the embeddings as arguments of the pipeline."""
    text, pooled, _ = pipe.encode_prompt(
        prompt=prompt,
        prompt_2=None,
        device=pipe._execution_device,
        max_sequence_length=max_sequence_length,
    )
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}


@dataclass(frozen=True)
class FluxState:
    """The inputs of a block.

    Attributes:
        image: Image tokens, B×S×D.
        text: Text tokens, B×T×D.
        conditioning: Embedded timestep, guidance and pooled text, B×D.
        rotary: cos and sin, (T+S)×head_dim each.
    """

    image: Tensor
    text: Tensor
    conditioning: Tensor
    rotary: tuple[Tensor, Tensor]


class FluxBlocks:
    """The parts of a step, made of the transformer's own modules."""

    def state(
        self,
        transformer: Transformer,
        latents: Tensor,
        text: Tensor,
        conditioning: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> FluxState:
        """The state before the first block: latents are B×S×C, all others are already embedded."""
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
        """Apply the modulated output norm and the projection; return the velocity, B×S×C."""
        output: Tensor = transformer.proj_out(transformer.norm_out(state.image, state.conditioning))
        return output

    conditioning = staticmethod(embed_conditioning)
    rotary = staticmethod(rotary)
