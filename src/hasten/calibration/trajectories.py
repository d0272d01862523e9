"""Full sampling runs, recorded where every pipeline agrees: at the scheduler's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.calibration.store import Store

__all__ = ["Trajectories", "at_scheduler_step", "record"]


@dataclass(frozen=True)
class Trajectories:
    """P full runs of N steps. D is the number of latent values of one image.

    sigmas: N + 1 falling noise levels, the last is the end; velocities: N×P×D, what the scheduler
    was given (after guidance); latents: (N+1)×P×D, from pure noise to the result. Float32, CPU.
    """

    sigmas: tuple[float, ...]
    velocities: Tensor
    latents: Tensor

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def of(self, rows: slice) -> Trajectories:
        """Some of the P runs."""
        return Trajectories(self.sigmas, self.velocities[:, rows], self.latents[:, rows])


OnStep = Callable[[int, Tensor, Tensor], Tensor]


@contextmanager
def at_scheduler_step(scheduler: Any, on_step: OnStep) -> Iterator[None]:
    """Inside, every `scheduler.step` first calls on_step(index, velocity, sample), whose result
    (shape of velocity) takes the velocity's place."""
    original = scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        index = scheduler.step_index
        index = (scheduler.begin_index or 0) if index is None else index
        return original(on_step(index, model_output, sample), timestep, sample, **kwargs)

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def record(
    sample: Callable[[Sequence[int]], Tensor],
    pipe: Any,
    count: int,
    batch: int,
    progress: Callable[[int, int], None],
    store: Store | None = None,
) -> Trajectories:
    """Record `count` runs in batches; `sample(ids)` draws those prompts and returns final latents.

    Nothing is approximated: each step's velocity is stored as the scheduler saw it. Batches that
    `store` has are not run again.
    """
    store = store or Store()
    parts: list[dict[str, Tensor]] = []
    for number, first in enumerate(range(0, count, batch)):
        progress(first, count)
        known = store.recording(number)
        if known is None:
            known = _record(sample, pipe, range(first, min(first + batch, count)))
            store.keep_recording(number, known)
        parts.append(known)
    progress(count, count)
    return Trajectories(
        tuple(parts[0]["sigmas"].tolist()),
        torch.cat([part["velocities"] for part in parts], dim=1),
        torch.cat([part["latents"] for part in parts], dim=1),
    )


def _record(
    sample: Callable[[Sequence[int]], Tensor], pipe: Any, ids: Sequence[int]
) -> dict[str, Tensor]:
    """`sigmas`, `velocities` and `latents` of one batch, shaped as in `Trajectories`."""
    velocities: list[Tensor] = []
    latents: list[Tensor] = []

    def keep(_: int, velocity: Tensor, latent: Tensor) -> Tensor:
        velocities.append(velocity.flatten(1).float().cpu())
        latents.append(latent.flatten(1).float().cpu())
        return velocity

    with at_scheduler_step(pipe.scheduler, keep):
        final = sample(ids)
    latents.append(final.flatten(1).float().cpu())
    sigmas = [*pipe.scheduler.sigmas.tolist(), 0.0][: len(velocities) + 1]
    return {
        "sigmas": torch.tensor(sigmas, dtype=torch.float64),
        "velocities": torch.stack(velocities),
        "latents": torch.stack(latents),
    }
