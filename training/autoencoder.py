"""The autoencoder: L1 + MSE + 0.5 LPIPS + 1e-4 KL on fresh composites.

It is trained on all images of both sets except the sixty for the evaluation, and on no held-out
triple.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hasten.quality.lpips import LPIPS
from training.data import Pack, sample_composites, triples
from training.models import FULL, SMOKE, autoencoder
from training.optimise import Job, autocast, averaged, fit
from training.run import Run
from training.vocabulary import COLOURS

__all__ = [
    "BATCH",
    "load_autoencoder",
    "reconstruction",
    "reconstruction_loss",
    "train_autoencoder",
    "training_batch",
    "unseen_composites",
]

BATCH = 60  # from 64 up, Diffusers' upsampler leaves the channels-last layout
PEAK = 8e-4
EXTRA_SHARE = 0.35  # of a batch: pictures outside the vocabulary
PERCEPTUAL, KL = 0.5, 1e-4


class Loss(nn.Module):
    """B×3×128×128 in [0, 1] -> the training loss."""

    def __init__(self, model: AutoencoderKL, perceptual: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.perceptual = perceptual

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        with autocast(images.device):
            mean, log_variance = self.model.encoder(images * 2 - 1).chunk(2, dim=1)
        mean, log_variance = mean.float(), log_variance.float().clamp(-30, 20)
        latents = mean + noise * torch.exp(0.5 * log_variance)
        with autocast(images.device):
            decoded = self.model.decoder(latents)
        spread = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(decoded, images, self.perceptual) + KL * spread


def reconstruction_loss(decoded: Tensor, images: Tensor, perceptual: nn.Module) -> Tensor:
    """L1 + MSE on the decoder's own scale of [-1, 1], and LPIPS; `images` are in [0, 1]."""
    decoded = decoded.float() / 2 + 0.5
    distance = perceptual(decoded, images).mean()
    absolute, squared = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
    return 2 * absolute + 4 * squared + PERCEPTUAL * distance


def training_batch(
    pack: Pack, rows: Tensor, extras: Tensor, batch: int, generator: torch.Generator
) -> Tensor:
    """Composites of `rows` triples, and of images outside the vocabulary on any colour."""
    device = pack.pictures.device
    others = int(batch * EXTRA_SHARE)
    pick = torch.randint(len(rows), (batch - others,), device=device, generator=generator)
    pick_extra = torch.randint(len(extras), (others,), device=device, generator=generator)
    any_colour = torch.randint(len(COLOURS), (others,), device=device, generator=generator)
    pictures = torch.cat([2 * rows[pick, 0] + rows[pick, 1], extras[pick_extra]])
    colours = torch.cat([rows[pick, 2], any_colour])
    return sample_composites(pack, pictures, colours, generator)


def unseen_composites(run: Run, pack: Pack) -> Tensor:
    """One composite per image that no model was trained on."""
    generator = run.generator(21)
    rows = pack.rows("unseen")
    colours = torch.arange(len(rows), device=run.device) % len(COLOURS)
    return sample_composites(pack, rows, colours, generator).clamp(0, 1)


@torch.inference_mode()
def reconstruction(model: AutoencoderKL, images: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Decoded posterior means in [0, 1], mean PSNR (dB) and mean LPIPS."""
    parts = []
    for part in images.split(64):
        latents = model.encode(part * 2 - 1).latent_dist.mode()
        parts.append(model.decode(latents).sample / 2 + 0.5)
    decoded = torch.cat(parts).float().clamp(0, 1)
    squared = (decoded - images).square().mean(dim=(1, 2, 3))
    distance = LPIPS().to(images.device)(decoded, images)
    psnr = -10 * squared.clamp_min(1e-10).log10()
    return decoded, {"psnr": psnr.mean().item(), "lpips": distance.mean().item()}


def load_autoencoder(run: Run) -> AutoencoderKL:
    """The averaged autoencoder, frozen."""
    return averaged(run, "autoencoder", autoencoder(SMOKE if run.smoke else FULL, shipped=False))


def train_autoencoder(run: Run, pack: Pack, budget: float) -> None:
    torch.manual_seed(run.seed + 20)
    model = autoencoder(SMOKE if run.smoke else FULL, shipped=False).train()
    model.to(run.device, memory_format=torch.channels_last)
    rows = triples(pack.things, seen=True, device=run.device)
    extras = pack.rows("extra")
    batch = 8 if run.smoke else BATCH
    loss_of = torch.compile(Loss(model, LPIPS().to(run.device)), disable=not run.compile)

    def batch_loss(generator: torch.Generator) -> Tensor:
        images = training_batch(pack, rows, extras, batch, generator)
        images = images.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(batch, 16, 16, 16, device=run.device, generator=generator)
        loss: Tensor = loss_of(images, noise)
        return loss

    clock = fit(run, Job("autoencoder", budget, PEAK, 200, 0.999), model, batch_loss)
    if clock.progress >= 1.0:
        numbers = reconstruction(load_autoencoder(run), unseen_composites(run, pack))[1]
        run.finish("autoencoder", steps=clock.step, seconds=clock.seconds, **numbers)
