"""The bundled model and pictures of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hasten

Draw = Callable[..., torch.Tensor]


@pytest.fixture(scope="package")
def tiny() -> Any:
    """The bundled model on the CPU in float32. Optimise copies of it only."""
    return hasten.load_pipeline("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="package")
def draw() -> Draw:
    """Call a pipeline for one picture: 1×3×128×128 in [0, 1], or its latents."""

    def run(pipe: Any, steps: int = 4, output_type: str = "pt") -> torch.Tensor:
        images = pipe(
            "a 3D render of a rocket on a blue background",
            num_inference_steps=steps,
            height=128,
            width=128,
            guidance_scale=3.0,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
        ).images
        images = torch.as_tensor(images).float()
        return images if output_type == "latent" else images.clamp(0, 1)

    return run
