"""A made-up family whose forward calls its inputs otherwise, for tests of the seam.

Its blocks are conditioned by adaLN, the scheduler's timestep reaches it in units of its own, and
its pipeline enters no `cache_context` and resets no cache: it has neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hasten.families.family import Conditioning, Family, Stack

WIDTH, CODE = 32, 16


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CODE, 2 * WIDTH)

    def forward(self, y: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.linear(nn.functional.silu(code))[:, None].chunk(2, dim=-1)
        normed: Tensor = nn.functional.layer_norm(y, (WIDTH,)) * (1 + scale) + shift
        return normed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, y: Tensor, code: Tensor) -> Tensor:
        out: Tensor = y + self.down(nn.functional.gelu(self.up(self.norm(y, code))))
        return out


class FakeTransformer(ModelMixin, ConfigMixin):
    """`moment` is the scheduler's timestep over 500; `style` a vector of the prompt."""

    @register_to_config
    def __init__(self, channels: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, WIDTH)
        self.time = nn.Linear(1, CODE)
        self.towers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, channels)

    def code(self, moment: Tensor, style: Tensor) -> Tensor:
        coded: Tensor = self.time(moment[:, None]) + style
        return coded

    def forward(
        self, noisy: Tensor, moment: Tensor, style: Tensor, return_dict: bool = True
    ) -> Any:
        y = self.embed(noisy)
        code = self.code(moment, style)
        for block in self.towers:
            y = block(y, code)
        out = self.head(y)
        return SimpleNamespace(sample=out) if return_dict else (out,)


class FakePipeline(DiffusionPipeline):
    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt: str, num_inference_steps: int = 6, generator: Any = None
    ) -> SimpleNamespace:
        style = torch.full((1, CODE), len(prompt) / 10)
        noisy = torch.randn(1, 9, 4, generator=generator)
        levels = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=levels)
        for timestep in self.scheduler.timesteps:
            moment = timestep.expand(1) / 500
            velocity = self.transformer(noisy=noisy, moment=moment, style=style, return_dict=False)[
                0
            ]
            noisy = self.scheduler.step(velocity, timestep, noisy).prev_sample
        return SimpleNamespace(images=noisy)


def rows(
    transformer: Any, inputs: Mapping[str, Any], moments: Tensor, dtype: torch.dtype
) -> Tensor:
    coded: Tensor = transformer.code(moments.to(dtype), inputs["style"])
    return coded


FAKE = Family(
    name="fake",
    stacks=(Stack("towers", ("y",)),),
    output=("y",),
    conditioning=Conditioning(
        norms=lambda transformer: [
            (f"towers.{index}.norm", block.norm) for index, block in enumerate(transformer.towers)
        ],
        rows=rows,
        inputs=("style",),
        timestep="moment",
        per_timestep=500.0,
    ),
)


def fake_pipe() -> FakePipeline:
    """A new pipeline with the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FakeTransformer().eval()
    pipe = FakePipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
