"""Records full sampling runs at the scheduler's step, which every pipeline calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.calibration.store import CalibrationStore
from hasten.errors import ModelError


@dataclass(frozen=True)
class Trajectories:
    """P full runs of N steps; D is the number of latent values per image.

    Attributes:
        sigmas: N + 1 decreasing noise levels.
        velocities: The scheduler's inputs, after guidance; N×P×D, float32, on the CPU.
        latents: From the initial noise to the final latents; (N+1)×P×D, float32, on the CPU.
    """

    sigmas: tuple[float, ...]
    velocities: Tensor
    latents: Tensor

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def of(self, rows: slice) -> Trajectories:
        """The selected runs, of the P runs."""
        return Trajectories(self.sigmas, self.velocities[:, rows], self.latents[:, rows])


OnStep = Callable[[int, Tensor, Tensor], Tensor]


@contextmanager
def at_scheduler_step(scheduler: Any, on_step: OnStep) -> Iterator[None]:
    """Context manager that passes the velocity of every `scheduler.step` through `on_step`.

    Args:
        scheduler: A Diffusers scheduler with `step_index` and `begin_index`.
        on_step: Called with the index of the step within the run, the velocity and the sample, and
            returns the velocity to use. A run with a late start (image to image) has index 0 at its
            own first step.
    """
    original = scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        begin = _begin(scheduler)
        index = begin if scheduler.step_index is None else scheduler.step_index
        return original(on_step(index - begin, model_output, sample), timestep, sample, **kwargs)

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _begin(scheduler: Any) -> int:
    """The index of the run's first step in the scheduler's sigmas; above 0 for a late start."""
    return int(scheduler.begin_index or 0)


def record(
    sample: Callable[[Sequence[int]], Tensor],
    pipe: Any,
    batches: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
    store: CalibrationStore | None = None,
) -> Trajectories:
    """Record full runs in batches.

    Args:
        sample: Samples the prompts with the given ids and returns their final latents.
        pipe: The pipeline that `sample` calls.
        batches: The ids of the prompts of each call.
        progress: Called with the number of recorded prompts and the total.
        store: Stores each batch. A batch that it already has is not run again.

    Raises:
        ModelError: A velocity or a latent is not finite.
        InputError: The store is damaged or cannot be written.
    """
    store = store or CalibrationStore()
    parts: list[dict[str, Tensor]] = []
    done, count = 0, sum(map(len, batches))
    for number, ids in enumerate(batches):
        progress(done, count)
        part = store.recording(number)
        if part is None:
            part = _record(sample, pipe, ids)
            store.keep_recording(number, part)
        parts.append(part)
        done += len(ids)
    progress(done, count)
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
    begin = _begin(pipe.scheduler)
    sigmas = [*pipe.scheduler.sigmas.tolist(), 0.0][begin : begin + len(velocities) + 1]
    recorded = {
        "sigmas": torch.tensor(sigmas, dtype=torch.float64),
        "velocities": torch.stack(velocities),
        "latents": torch.stack(latents),
    }
    if not all(tensor.isfinite().all() for tensor in recorded.values()):
        raise ModelError(
            "the latents or velocities of the model are not finite",
            "load the model in bfloat16 or float32; if it already is, its weights are damaged",
        )
    return recorded
