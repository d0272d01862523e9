"""The function of an engine: one transformer step of five named tensors.

| name     | shape             | dtype     | content |
| -------- | ----------------- | --------- | ------- |
| latents  | 1×S×C             | precision | packed latents |
| text     | 1×T×D             | precision | embedded text, after `context_embedder` |
| row      | 1×width           | precision | every adaLN modulation of the step (`Modulations`) |
| cos, sin | (T+S)×head_dim    | float32   | rotary embedding, text first |
| velocity | 1×S×C             | precision | the output |

This is the signature of `hasten.step.constants.Body`. Timestep, guidance and pooled text are passed
as the row, so an engine does not contain the modulation weights (two fifths of an FP8 FLUX.1). T is
fixed; S, the number of image tokens, may vary within the engine's profile.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.engines.tensorrt.manifest import Shapes
from hasten.families.family import Family
from hasten.quantization.report import watched
from hasten.step.modulations import Modulations, RowReaders

INPUTS = ("latents", "text", "row", "cos", "sin")
OUTPUT = "velocity"
STATE = "block/"  # prefix of the blocks' outputs in a graph


class Step(nn.Module):
    """A transformer step from latents to velocity, with the modulations as an input row.

    The modulation linears of the transformer read the row while the step runs.

    Args:
        transformer: The transformer.
        family: Its family.
    """

    def __init__(self, transformer: Any, family: Family) -> None:
        super().__init__()
        self.readers = RowReaders(Modulations(family.modulated_norms(transformer)))
        self.transformer = transformer
        self.family = family

    def forward(
        self, latents: Tensor, text: Tensor, row: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """The velocity, 1×S×C; shapes as in the module's table."""
        parts = self.family.export
        state = parts.state(self.transformer, latents, text, row, (cos, sin))
        with self.readers.reading(row):
            for _, after in parts.blocks(self.transformer, state):
                state = after
            velocity: Tensor = parts.epilogue(self.transformer, state)
            return velocity


def state_name(block: str, position: int) -> str:
    """The name of a block's output in a graph.

    Args:
        block: The block's name.
        position: The output's position; for FLUX.1, 0 is text (1×T×D) and 1 is image (1×S×D).
    """
    return f"{STATE}{block}/{position}"


def block_of(state: str) -> str:
    """The block of an output with this name."""
    return state.removeprefix(STATE).rpartition("/")[0]


class Watched(Step):
    """A step for the exporter: returns the velocity, then all outputs of all blocks.

    As graph outputs, the blocks' outputs stay separate tensors during optimisation, so that a
    finished graph can be read block by block.

    Attributes:
        names: The names of the blocks' outputs, set by the first call.
    """

    names: tuple[str, ...] = ()

    def forward(  # type: ignore[override]
        self, latents: Tensor, text: Tensor, row: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        """The velocity, 1×S×C, then the outputs of each block; the inputs are those of `Step`."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str, _: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            outputs.update({state_name(name, at): tensor for at, tensor in enumerate(output)})

        blocks = self.family.repeated_blocks(self.transformer)
        with watched(blocks, lambda name: partial(keep, name)):
            velocity = super().forward(latents, text, row, cos, sin)
        self.names = tuple(outputs)
        return velocity, *outputs.values()


def most_square(tokens: int) -> tuple[int, int]:
    """The sides of the most square image with that many tokens, the shorter one first."""
    short = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return short, tokens // short


def graph_sizes(transformer: Any, family: Family) -> dict[str, int]:
    """The fixed sizes of a transformer's graph, under their names in a manifest."""
    return {
        "channels": transformer.config.in_channels,
        "text_dim": transformer.inner_dim,
        "row_width": Modulations(family.modulated_norms(transformer)).width,
        "head_dim": transformer.config.attention_head_dim,
    }


@torch.no_grad()
def sample(
    transformer: Any,
    family: Family,
    shapes: Shapes,
    height: int,
    width: int,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Tensor]:
    """Sample random inputs of a step on the transformer's device.

    Latents, text and pooled text are sampled from N(0, 1) on the CPU. The text is embedded and the
    row is computed at half noise by the model, in its own dtype. All inputs except cos and sin are
    then rounded to `dtype`. The caller's generators are not changed.

    Args:
        transformer: The transformer.
        family: Its family.
        shapes: The sizes of the engine; only the text length is used.
        height: Height in image tokens.
        width: Width in image tokens.
        dtype: The dtype of the inputs.
        seed: The seed.

    Returns:
        The inputs by name.
    """
    config, reference = transformer.config, transformer.x_embedder.weight
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(reference.device, reference.dtype)

    latents = normal(1, height * width, config.in_channels)
    text = transformer.context_embedder(normal(1, shapes.text, config.joint_attention_dim))
    half = torch.full((1,), 0.5, device=reference.device, dtype=reference.dtype)
    guidance = torch.full_like(half, 3.5) if config.guidance_embeds else None
    pooled = normal(1, config.pooled_projection_dim)
    conditioning = family.export.conditioning(transformer, half, guidance, pooled, reference.dtype)
    row = Modulations(family.modulated_norms(transformer)).rows(conditioning)
    ids = torch.zeros(shapes.text + height * width, 3, device=reference.device)
    places = torch.arange(height * width, device=reference.device)
    ids[shapes.text :, 1] = (places // width).float()
    ids[shapes.text :, 2] = (places % width).float()
    cos, sin = family.export.rotary(transformer, ids[: shapes.text], ids[shapes.text :])
    rounded = {"latents": latents, "text": text, "row": row}
    return {**{name: x.to(dtype) for name, x in rounded.items()}, "cos": cos, "sin": sin}
