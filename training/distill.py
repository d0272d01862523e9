"""Guidance distillation (Meng et al. 2022, arXiv:2210.03142): one call instead of two.

The student is the teacher with FLUX.1-dev's guidance embedding. Its target at guidance w is
v_u + w·(v_c - v_u), the teacher's classifier-free guided velocity, with w uniform in 1…5. The text
encoders are the teacher's, and frozen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from training.data import Pack
from training.flow import (
    CaptionTable,
    Teacher,
    caption_table,
    load_teacher,
    position_ids,
    sample_pairs,
)
from training.latents import load_latents
from training.models import FULL, SMOKE, transformer
from training.optimise import Job, autocast, averaged, fit
from training.run import Run

__all__ = ["encoded_captions", "load_student", "train_distill"]

BATCH = 512
PEAK = 5e-4
WARMUP = 100
GUIDANCE = (1.0, 5.0)
EMPTY_CAPTIONS = 0.02


@torch.no_grad()
def encoded_captions(teacher: Teacher, table: CaptionTable) -> tuple[Tensor, Tensor]:
    """Every caption's (N×32×D token states, N×C pooled), in bf16: the text encoders are frozen."""
    states, pooled = [], []
    for t5_ids, clip_ids in zip(table.t5.split(1024), table.clip.split(1024), strict=True):
        tokens, pool = teacher.encode(t5_ids, clip_ids)
        states.append(tokens.bfloat16())
        pooled.append(pool.bfloat16())
    return torch.cat(states), torch.cat(pooled)


class Guided(nn.Module):
    """The teacher's guided velocity, both halves in one batch."""

    def __init__(self, model: FluxTransformer2DModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, w: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """`text` 2B×32×D and `pooled` 2B×C: the captions, then as many empty ones."""
        text_ids, image_ids = position_ids(x.device)
        both = self.model(
            hidden_states=torch.cat([x, x]),
            timestep=torch.cat([t, t]),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        conditional, unconditional = both.float().chunk(2)
        return unconditional + w[:, None, None] * (conditional - unconditional)


class Student(nn.Module):
    """The student's velocity, `w` passed as `FluxPipeline` passes `guidance_scale`."""

    def __init__(self, model: FluxTransformer2DModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, w: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        text_ids, image_ids = position_ids(x.device)
        velocity: Tensor = self.model(
            hidden_states=x,
            timestep=t,
            guidance=w,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return velocity.float()


def student_from(teacher: Teacher, *, smoke: bool) -> FluxTransformer2DModel:
    """The teacher's weights plus a guidance embedding whose output starts at zero."""
    student = transformer(SMOKE if smoke else FULL, guidance=True)
    missing, unexpected = student.load_state_dict(teacher.transformer.state_dict(), strict=False)
    if unexpected or not all("guidance_embedder" in name for name in missing):
        raise ValueError(f"the student does not fit the teacher: {missing} {unexpected}")
    nn.init.zeros_(student.time_text_embed.guidance_embedder.linear_2.weight)
    return student.to(next(teacher.parameters()).device)


def load_student(run: Run) -> FluxTransformer2DModel:
    """The averaged student, frozen."""
    return averaged(run, "distill", transformer(SMOKE if run.smoke else FULL, guidance=True))


def train_distill(run: Run, pack: Pack, budget: float) -> None:
    torch.manual_seed(run.seed + 50)
    latents, table = load_latents(run), caption_table(pack, run.device)
    teacher = load_teacher(run, pack)
    text, pooled = encoded_captions(teacher, table)
    student = student_from(teacher, smoke=run.smoke).train()
    batch = 8 if run.smoke else BATCH
    guided = torch.compile(Guided(teacher.transformer), disable=not run.compile)
    velocity_of = torch.compile(Student(student), disable=not run.compile)

    def batch_loss(generator: torch.Generator) -> Tensor:
        x0, captions = sample_pairs(latents, table, batch, generator, EMPTY_CAPTIONS)
        noise = torch.randn(x0.shape, device=run.device, generator=generator)
        t = torch.sigmoid(torch.randn(batch, device=run.device, generator=generator))
        low, high = GUIDANCE
        w = low + (high - low) * torch.rand(batch, device=run.device, generator=generator)
        both = torch.cat([captions, torch.full_like(captions, table.empty)])
        states, pools = text[both].float(), pooled[both].float()
        x = torch.lerp(x0, noise, t[:, None, None])
        with autocast(run.device):
            with torch.no_grad():
                target = guided(x, t, w, states, pools)
            velocity = velocity_of(x, t, w, states[:batch], pools[:batch])
        return F.mse_loss(velocity, target)

    clock = fit(run, Job("distill", budget, PEAK, WARMUP, 0.999), student, batch_loss)
    if clock.progress >= 1.0:
        run.finish("distill", steps=clock.step, seconds=clock.seconds)
