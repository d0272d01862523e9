"""The teacher: transformer and both text encoders trained together by rectified flow.

x_t = (1 - t)·x_0 + t·noise with t logit-normal; the target is noise - x_0 (Esser et al. 2024,
arXiv:2403.03206). One caption in ten is empty, so that the teacher learns the unconditional
velocity that guidance needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from training.captions import VARIANTS, all_captions
from training.data import Pack
from training.latents import Latents, load_latents
from training.models import FULL, SMOKE, clip_text, parameter_count, t5_encoder, transformer
from training.optimise import Job, autocast, averaged, fit
from training.run import Run
from training.text import TEXT_TOKENS, clip_tokenizer, t5_tokenizer
from training.vocabulary import COLOURS, STYLES, things

__all__ = [
    "CaptionTable",
    "Teacher",
    "caption_table",
    "load_teacher",
    "position_ids",
    "sample_captions",
    "sample_pairs",
    "train_flow",
]

BATCH = 512
PEAK = 1e-3
WARMUP = 300
EMPTY_CAPTIONS = 0.10
MISSING_PART = 0.06  # captions without a style, and captions without a background


@dataclass(frozen=True)
class CaptionTable:
    """Token ids of every caption: thing × (styles, none) × (colours, none) × variant, flattened,
    with the empty caption last. Ids are N×32."""

    t5: Tensor
    clip: Tensor

    @property
    def empty(self) -> int:
        return len(self.t5) - 1


def tokenised(tokenizer: Any, captions: list[str]) -> Tensor:
    """N×32 ids, exactly as `FluxPipeline` makes them."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=TEXT_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def caption_table(pack: Pack, device: torch.device) -> CaptionTable:
    captions = [*all_captions(things()[: pack.things]), ""]
    return CaptionTable(
        tokenised(t5_tokenizer(pack.unigram), captions).to(device),
        tokenised(clip_tokenizer(pack.bpe), captions).to(device),
    )


def sample_captions(
    triple: Tensor, table: CaptionTable, generator: torch.Generator, empty: float
) -> Tensor:
    """One caption index per row of B×3 triples: a random wording, sometimes without a part."""
    count, device = len(triple), triple.device
    chance = torch.rand(3, count, device=device, generator=generator)
    variant = torch.randint(VARIANTS, (count,), device=device, generator=generator)
    # Half of the captions use the plain wording that the prompts use.
    variant = torch.where(chance[2] > 0.55, torch.zeros_like(variant), variant)
    style = torch.where(chance[0] < MISSING_PART, len(STYLES), triple[:, 1])
    colour = torch.where(chance[1] < MISSING_PART, len(COLOURS), triple[:, 2])
    index = (triple[:, 0] * (len(STYLES) + 1) + style) * (len(COLOURS) + 1) + colour
    index = index * VARIANTS + variant
    dropped = torch.rand(count, device=device, generator=generator) < empty
    return torch.where(dropped, table.empty, index)


def sample_pairs(
    latents: Latents, table: CaptionTable, batch: int, generator: torch.Generator, empty: float
) -> tuple[Tensor, Tensor]:
    """(B×64×64 float32 latents drawn from their posteriors, B caption indices), no host sync."""
    device = latents.mean.device
    row = torch.randint(len(latents.rows), (batch,), device=device, generator=generator)
    jitter = torch.randint(latents.mean.shape[1], (batch,), device=device, generator=generator)
    noise = torch.randn(batch, 64, 64, device=device, generator=generator)
    x0 = latents.mean[row, jitter].float() + latents.spread[row, jitter].float() * noise
    return x0, sample_captions(latents.rows[row], table, generator, empty)


def position_ids(device: torch.device) -> tuple[Tensor, Tensor]:
    """(32×3 text ids, 64×3 image ids) as `FluxPipeline` makes them for 128×128 pixels."""
    text = torch.zeros(TEXT_TOKENS, 3, device=device)
    image = torch.zeros(8, 8, 3, device=device)
    image[..., 1] += torch.arange(8, device=device)[:, None]
    image[..., 2] += torch.arange(8, device=device)[None, :]
    return text, image.reshape(64, 3)


class Teacher(nn.Module):
    """Transformer without guidance embedding, T5 and CLIP."""

    def __init__(self, pack: Pack, *, smoke: bool) -> None:
        super().__init__()
        sizes = SMOKE if smoke else FULL
        self.transformer: FluxTransformer2DModel = transformer(sizes, guidance=False)
        self.t5: T5EncoderModel = t5_encoder(sizes, len(pack.unigram))
        self.clip: CLIPTextModel = clip_text(sizes, pack.bpe["vocab"])

    def encode(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """B×32 ids each -> (B×32×D token states, B×C pooled)."""
        return self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output

    def forward(self, x0: Tensor, noise: Tensor, t: Tensor, t5: Tensor, clip: Tensor) -> Tensor:
        """The rectified-flow loss of one batch; `t` (B) in (0, 1), 1 is pure noise."""
        text, pooled = self.encode(t5, clip)
        text_ids, image_ids = position_ids(x0.device)
        weight = t[:, None, None]
        velocity = self.transformer(
            hidden_states=torch.lerp(x0, noise, weight),
            timestep=t,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.float(), noise - x0)


def load_teacher(run: Run, pack: Pack) -> Teacher:
    """The averaged teacher, frozen."""
    return averaged(run, "flow", Teacher(pack, smoke=run.smoke))


def train_flow(run: Run, pack: Pack, budget: float) -> None:
    torch.manual_seed(run.seed + 40)
    latents, table = load_latents(run), caption_table(pack, run.device)
    model = Teacher(pack, smoke=run.smoke).to(run.device).train()
    batch = 8 if run.smoke else BATCH
    loss_of = torch.compile(model, disable=not run.compile)
    print(f"[flow] {parameter_count(model) / 1e6:.2f} M parameters, batch {batch}", flush=True)

    def batch_loss(generator: torch.Generator) -> Tensor:
        x0, captions = sample_pairs(latents, table, batch, generator, EMPTY_CAPTIONS)
        noise = torch.randn(x0.shape, device=run.device, generator=generator)
        t = torch.sigmoid(torch.randn(batch, device=run.device, generator=generator))
        with autocast(run.device):
            loss: Tensor = loss_of(x0, noise, t, table.t5[captions], table.clip[captions])
        return loss

    clock = fit(run, Job("flow", budget, PEAK, WARMUP), model, batch_loss)
    if clock.progress >= 1.0:
        run.finish("flow", steps=clock.step, seconds=clock.seconds)
