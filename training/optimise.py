"""The shared training loop of all phases, its learning-rate schedule, and weight averaging."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from training.run import Clock, Run

__all__ = ["Average", "Job", "autocast", "averaged", "fit", "learning_rate"]

AVERAGE_EVERY = 4
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Job:
    """One training phase: its name, seconds, peak learning rate, warm-up steps, EMA limit."""

    phase: str
    budget: float
    peak: float
    warmup: int
    average_limit: float = 0.9998


def learning_rate(peak: float, progress: float, steps_taken: int, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine in `progress` down to 1 % of the peak.

    `steps_taken` counts from the moment the optimiser's moments were last empty, so that a run
    resumed without them warms up again.
    """
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * cosine * min(1.0, (steps_taken + 1) / warmup)


def adamw(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    found = list(parameters)
    groups = [
        {"params": [p for p in found if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in found if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type == "cuda"
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=fused)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast on devices where it is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Average:
    """Exponential moving average of parameters, updated every `AVERAGE_EVERY` steps.

    The decay per step is min(limit, 1 - 1/(10 + 0.08 n)), which forgets the start quickly.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], limit: float = 0.9998) -> None:
        self.live = list(parameters)
        self.mean = [p.detach().clone() for p in self.live]
        self.limit = limit

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step % AVERAGE_EVERY:
            return
        decay = min(self.limit, 1 - 1 / (10 + 0.08 * step)) ** AVERAGE_EVERY
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def load(self, mean: list[Tensor]) -> None:
        torch._foreach_copy_(self.mean, mean)

    @torch.no_grad()
    def copy_to_live(self) -> None:
        """Put the average into the parameters themselves."""
        torch._foreach_copy_(self.live, self.mean)


def averaged(run: Run, phase: str, model: ModelT) -> ModelT:
    """`model` on the run's device with the averaged weights that `phase` left, frozen."""
    state = run.load(f"{phase}.pt")
    if state is None:
        raise FileNotFoundError(f"{run.folder} has no {phase}.pt: run that phase first")
    model.to(run.device)
    average = Average(model.parameters())
    average.load(state["average"])
    average.copy_to_live()
    return model.eval().requires_grad_(False)


def fit(
    run: Run, job: Job, model: nn.Module, batch_loss: Callable[[torch.Generator], Tensor]
) -> Clock:
    """Train `model` on `batch_loss` until the budget or the call ends; resumable.

    The checkpoint `PHASE.pt` holds weights, their average, the optimiser and the clock. The first
    batch is run once before the clock starts: compilation is not training time.
    """
    optimizer = adamw(model.parameters(), run.device)
    average = Average(model.parameters(), job.average_limit)

    def save() -> None:
        content = {"model": model.state_dict(), "average": average.mean, **clock.state()}
        run.save(f"{job.phase}.pt", {**content, "optimizer": optimizer.state_dict()})

    clock = Clock(job.phase, job.budget, run.deadline, save)
    state = run.load(f"{job.phase}.pt")
    moments_from = 0
    if state is not None:
        average.load(state["average"])
        if "model" in state:
            model.load_state_dict(state["model"])
        else:
            average.copy_to_live()
        clock.elapsed, clock.step = state["elapsed"], int(state["step"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        else:  # a checkpoint shrunk by training.bundle: the moments fill again from here
            moments_from = clock.step
    generator = run.generator(clock.step + sum(job.phase.encode()))
    batch_loss(generator).backward()
    optimizer.zero_grad(set_to_none=True)
    running = torch.zeros((), device=run.device)
    clock.start()
    while clock.running:
        rate = learning_rate(job.peak, clock.progress, clock.step - moments_from, job.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = batch_loss(generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(clock.step)
        first = clock.step == clock.first_step
        running = torch.lerp(running, loss.detach(), 1.0 if first else 0.02)
        clock.tick(running, rate)
    save()
    return clock
