"""What a schedule is to keep near the full run: the final latents, or their picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.families import family_of
from hasten.quality import lpips

ObjectiveName = Literal["latent", "lpips"]
Objective = Callable[[Tensor], float]  # of P final latents, P×D
BATCH = 8


def relative_error(reference: Tensor) -> Objective:
    """Mean over P of ‖latents − reference‖ / ‖reference‖, both P×D."""

    def error(latents: Tensor) -> float:
        return float(((latents - reference).norm(dim=1) / reference.norm(dim=1)).mean())

    return error


def picture_distance(pipe: Any, reference: Tensor, height: int, width: int) -> Objective:
    """Mean LPIPS between the pictures of final latents and of `reference`, both P×D."""
    wanted = decode_pictures(pipe, reference, height, width)

    def distance(latents: Tensor) -> float:
        return float(lpips(decode_pictures(pipe, latents, height, width), wanted).mean())

    return distance


@torch.no_grad()
def decode_pictures(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Pictures, P×3×H×W in [0, 1], float32, on the pipeline's device; latents are P×D.

    Raises:
        UnsupportedError: How to decode latents is not declared for this family.
    """
    family = family_of(pipe)
    if family.decode is None:
        raise UnsupportedError(
            f"how final latents of {family.name} become pictures is not declared",
            'calibrate with objective = "latent", or declare it: hasten.register_family',
        )
    channels = pipe.transformer.config.in_channels
    pictures = []
    for some in torch.split(latents, BATCH):
        packed = some.view(len(some), -1, channels).to(pipe._execution_device, pipe.vae.dtype)
        image = family.decode(pipe, packed, height, width)
        pictures.append((image.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(pictures)
