"""Latents of every training triple, encoded once, so that the flow phase needs no autoencoder."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.autoencoder import load_autoencoder
from training.data import Pack, sample_composites, triples
from training.optimise import autocast
from training.run import Run

__all__ = ["Latents", "encode_latents", "load_latents"]

JITTERS = 12  # composites of one triple
BATCH = 1024


@dataclass(frozen=True)
class Latents:
    """`mean`, `spread`: M×J×64×64 bf16 packed tokens (posterior mean and standard deviation),
    already shifted and scaled; `rows`: M×3 triples; `scaling`, `shift`: the decoder's factors."""

    mean: Tensor
    spread: Tensor
    rows: Tensor
    scaling: float
    shift: float


def packed(latents: Tensor) -> Tensor:
    """B×16×16×16 -> B×64×64: 2×2 patches become tokens, in FLUX's order."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h * w // 4, 4 * c)


@torch.inference_mode()
def posteriors(model: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    with autocast(images.device):
        moments = model.encode(images * 2 - 1).latent_dist
    return packed(moments.mean.float()), packed(moments.std.float())


def encode_latents(run: Run, pack: Pack) -> None:
    model = load_autoencoder(run).to(memory_format=torch.channels_last)
    rows = triples(pack.things, seen=True, device=run.device)
    generator = run.generator(30)
    jitters = 2 if run.smoke else JITTERS
    every = rows.repeat_interleave(jitters, dim=0)
    shape = (len(every), 64, 64)
    mean = torch.empty(shape, dtype=torch.bfloat16, device=run.device)
    spread = torch.empty_like(mean)
    started = time.monotonic()
    for first in range(0, len(every), BATCH):
        part = every[first : first + BATCH]
        images = sample_composites(pack, 2 * part[:, 0] + part[:, 1], part[:, 2], generator)
        found = posteriors(model, images.contiguous(memory_format=torch.channels_last))
        mean[first : first + len(part)], spread[first : first + len(part)] = found
    # Statistics in slices: the whole thing in float32 would double the memory for nothing.
    total = sum(part.double().sum() for part in mean.split(4096)) / mean.numel()
    variance = sum((part.double() - total).square().sum() for part in mean.split(4096))
    shift = float(total)
    scaling = float((variance / mean.numel()).rsqrt())
    for tensor, offset in ((mean, shift), (spread, 0.0)):
        for part in tensor.split(4096):
            part.copy_((part.float() - offset) * scaling)
    run.save(
        "latents.pt",
        {
            "mean": mean.view(len(rows), jitters, 64, 64),
            "spread": spread.view(len(rows), jitters, 64, 64),
            "rows": rows,
            "scaling": scaling,
            "shift": shift,
        },
    )
    seconds = time.monotonic() - started
    run.finish(
        "latents",
        count=len(every),
        seconds=seconds,
        scaling=scaling,
        shift=shift,
        relative_spread=float(spread.float().mean()),
    )


def load_latents(run: Run) -> Latents:
    state = run.load("latents.pt")
    if state is None:
        raise FileNotFoundError(f"{run.folder} has no latents: run that phase first")
    return Latents(**state)
