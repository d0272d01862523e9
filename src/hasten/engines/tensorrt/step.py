"""What an engine computes: one transformer step as a function of five named tensors.

| name     | shape             | dtype     | what |
| -------- | ----------------- | --------- | ---- |
| latents  | 1×S×C             | precision | packed latents |
| text     | 1×T×D             | precision | embedded text: after `context_embedder` |
| row      | 1×width           | precision | every adaLN modulation of the step (`Modulations`) |
| cos, sin | (T+S)×head_dim    | float32   | rotary embedding, text first |
| velocity | 1×S×C             | precision | the output |

This is the signature of `hasten.step.constants.Body`: timestep, guidance and pooled text come
in as the row, so the modulation weights (two fifths of an FP8 FLUX.1) are in no engine. T is fixed;
S, the number of image tokens, is free within the engine's profile.
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
STATE = "block/"  # begins the names of the blocks' outputs in a graph


class Step(nn.Module):
    """The blocks of a transformer between latents and velocity, with a row for its modulations.

    The modulation linears of the transformer that it is given read the row while it runs.
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
    """The name in a graph of a block's output at this position.

    Of FLUX.1's blocks, 0 is text (1×T×D) and 1 is image (1×S×D).
    """
    return f"{STATE}{block}/{position}"


def block_of(state: str) -> str:
    """The block whose output has this name."""
    return state.removeprefix(STATE).rpartition("/")[0]


class Watched(Step):
    """A step for the exporter: returns the velocity, then all outputs of all blocks.

    `names` are those of the latter, known once it has run. Exported with them as graph outputs,
    the tensors stay separate through optimisation and a finished graph can be read block by block.
    """

    names: tuple[str, ...] = ()

    def forward(  # type: ignore[override]
        self, latents: Tensor, text: Tensor, row: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        """The velocity, 1×S×C, then the outputs of each block; inputs as those of `Step`."""
        found: dict[str, Tensor] = {}

        def keep(name: str, _: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            found.update({state_name(name, at): tensor for at, tensor in enumerate(output)})

        blocks = self.family.repeated_blocks(self.transformer)
        with watched(blocks, lambda name: partial(keep, name)):
            velocity = super().forward(latents, text, row, cos, sin)
        self.names = tuple(found)
        return velocity, *found.values()


def most_square(tokens: int) -> tuple[int, int]:
    """Two sides, the shorter one first, of the most square image with so many tokens."""
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
    """Random inputs of a step, of height × width image tokens, on the transformer's device.

    Latents, text and pooled text are drawn from N(0, 1) on the CPU; the text goes through the
    model's embedding and the row through its modulations, at half noise, in its own dtype, and all
    but cos and sin are rounded to `dtype` then. The caller's generators stay as they are.
    """
    config, here = transformer.config, transformer.x_embedder.weight
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(here.device, here.dtype)

    latents = normal(1, height * width, config.in_channels)
    text = transformer.context_embedder(normal(1, shapes.text, config.joint_attention_dim))
    half = torch.full((1,), 0.5, device=here.device, dtype=here.dtype)
    guidance = torch.full_like(half, 3.5) if config.guidance_embeds else None
    pooled = normal(1, config.pooled_projection_dim)
    conditioning = family.export.conditioning(transformer, half, guidance, pooled, here.dtype)
    row = Modulations(family.modulated_norms(transformer)).rows(conditioning)
    ids = torch.zeros(shapes.text + height * width, 3, device=here.device)
    places = torch.arange(height * width, device=here.device)
    ids[shapes.text :, 1] = (places // width).float()
    ids[shapes.text :, 2] = (places % width).float()
    cos, sin = family.export.rotary(transformer, ids[: shapes.text], ids[shapes.text :])
    rounded = {"latents": latents, "text": text, "row": row}
    return {**{name: x.to(dtype) for name, x in rounded.items()}, "cos": cos, "sin": sin}
