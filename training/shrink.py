"""The autoencoder that ships: a narrower one, fitted to the latents of the one that was trained.

The transformer has learned the wide autoencoder's latents, so those stay the same: the narrow
encoder learns to predict the wide one's moments, the narrow decoder to decode latents of either. It
starts from the wide one's weights, cut to size where they are too large.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hasten.quality.lpips import LPIPS
from training.autoencoder import (
    BATCH,
    load_autoencoder,
    reconstruction,
    reconstruction_loss,
    training_batch,
    unseen_composites,
)
from training.data import Pack, triples
from training.models import FULL, SMOKE, autoencoder
from training.optimise import Job, autocast, averaged, fit
from training.run import Run

__all__ = ["load_shipped", "narrowed", "train_shrink"]

PEAK = 6e-4
OWN_LATENTS = 0.3  # of a batch: decoded from the narrow encoder's latents
MATCH = 2.0


class Loss(nn.Module):
    """B×3×128×128 in [0, 1] -> how far narrow moments and reconstructions are off."""

    def __init__(self, wide: AutoencoderKL, narrow: AutoencoderKL, perceptual: nn.Module) -> None:
        super().__init__()
        self.wide = wide
        self.narrow = narrow
        self.perceptual = perceptual

    def forward(self, images: Tensor, own: Tensor) -> Tensor:
        """`own` (B) in [0, 1): below `OWN_LATENTS` an image is decoded from its own latents."""
        with autocast(images.device):
            with torch.no_grad():
                target = self.wide.encoder(images * 2 - 1)
            moments = self.narrow.encoder(images * 2 - 1)
        (mean, log_variance), (wanted, wanted_log) = (
            m.float().chunk(2, dim=1) for m in (moments, target)
        )
        latents = torch.where(own[:, None, None, None] < OWN_LATENTS, mean, wanted)
        with autocast(images.device):
            decoded = self.narrow.decoder(latents)
        match = F.mse_loss(mean, wanted) + 0.05 * F.mse_loss(log_variance, wanted_log)
        return reconstruction_loss(decoded, images, self.perceptual) + MATCH * match


def narrowed(wide: AutoencoderKL, narrow: AutoencoderKL) -> AutoencoderKL:
    """Give `narrow` the wide one's weights: leading channels, rescaled for the inputs cut off."""
    source = wide.state_dict()
    with torch.no_grad():
        for name, tensor in narrow.state_dict().items():
            cut = source[name][tuple(slice(size) for size in tensor.shape)]
            lost = source[name].shape[1] / tensor.shape[1] if tensor.ndim > 1 else 1.0
            tensor.copy_(cut * lost)
    return narrow


def load_shipped(run: Run) -> AutoencoderKL:
    """The averaged narrow autoencoder, frozen."""
    return averaged(run, "shrink", autoencoder(SMOKE if run.smoke else FULL, shipped=True))


def train_shrink(run: Run, pack: Pack, budget: float) -> None:
    torch.manual_seed(run.seed + 60)
    wide = load_autoencoder(run).to(memory_format=torch.channels_last)
    narrow = autoencoder(SMOKE if run.smoke else FULL, shipped=True).to(run.device)
    narrow = narrowed(wide, narrow).to(memory_format=torch.channels_last).train()
    rows, extras = triples(pack.things, seen=True, device=run.device), pack.rows("extra")
    batch = 8 if run.smoke else BATCH
    # Not compiled: that would take longer than what it saves in so short a phase.
    loss_of = Loss(wide, narrow, LPIPS().to(run.device))

    def batch_loss(generator: torch.Generator) -> Tensor:
        images = training_batch(pack, rows, extras, batch, generator)
        images = images.contiguous(memory_format=torch.channels_last)
        own = torch.rand(batch, device=run.device, generator=generator)
        found: Tensor = loss_of(images, own)
        return found

    clock = fit(run, Job("shrink", budget, PEAK, 100, 0.999), narrow, batch_loss)
    if clock.progress >= 1.0:
        numbers = reconstruction(load_shipped(run), unseen_composites(run, pack))[1]
        run.finish("shrink", steps=clock.step, seconds=clock.seconds, **numbers)
