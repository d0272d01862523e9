"""Objectives of a calibration: the distance of final latents, or of their images, to a full run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.families import family_of
from hasten.quality import lpips

ObjectiveName = Literal["latent", "lpips"]
Objective = Callable[[Tensor], float]  # maps P final latents, P×D, to a loss
BATCH = 8


def relative_error(reference: Tensor) -> Objective:
    """The objective that averages ‖latents − reference‖ / ‖reference‖ over P; both are P×D."""

    def error(latents: Tensor) -> float:
        return float(((latents - reference).norm(dim=1) / reference.norm(dim=1)).mean())

    return error


def image_distance(pipe: Any, reference: Tensor, height: int, width: int) -> Objective:
    """The objective that averages the LPIPS of the images of latents and `reference`; both P×D."""
    target = decode_images(pipe, reference, height, width)

    def distance(latents: Tensor) -> float:
        return float(lpips(decode_images(pipe, latents, height, width), target).mean())

    return distance


@torch.no_grad()
def decode_images(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Decode final latents.

    Args:
        pipe: A pipeline of a family that declares `decode`.
        latents: P×D.
        height: In pixels.
        width: In pixels.

    Returns:
        P×3×H×W in [0, 1], float32, on the pipeline's device.

    Raises:
        UnsupportedError: The family does not declare how to decode latents.
    """
    family = family_of(pipe)
    if family.decode is None:
        raise UnsupportedError(
            f"the family {family.name} does not declare how to decode latents",
            'calibrate with objective = "latent", or declare it with hasten.register_family',
        )
    channels = pipe.transformer.config.in_channels
    images = []
    for part in torch.split(latents, BATCH):
        packed = part.view(len(part), -1, channels).to(pipe._execution_device, pipe.vae.dtype)
        image = family.decode(pipe, packed, height, width)
        images.append((image.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)
