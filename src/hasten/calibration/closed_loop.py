"""Fit a plan's weights while it runs, so that each gap also mends what earlier gaps left.

At a computed step i, with the sample x̂_i that the plan has really reached, the weights of the gap
to the next computed step j are those that bring x̂_i + (σ_j − σ_i) Σ_k w_k v_k closest to the x_j of
the full run. Starting from the real x̂_i, and not from x_i, keeps errors from adding up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.calibration.objective import Objective, relative_error
from hasten.calibration.search import fit_weights
from hasten.calibration.trajectories import Trajectories, at_scheduler_step
from hasten.passes.cache.predict import Weights


class ClosedLoop:
    """Replaces each step's velocity during one batch of runs, fitting weights at computed steps."""

    def __init__(self, full: Trajectories, path: Sequence[int], order: int) -> None:
        self.full = full
        self.path = list(path)
        self.order = order
        self.known: list[Tensor] = []  # newest first, P×D float32
        self.weights: list[Weights] = []

    def __call__(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """The velocity of this step (shape of `velocity`) instead of what the pipeline has."""
        if index in self.path:
            self.known = [velocity.flatten(1).float(), *self.known][: self.order]
            self.weights.append(self._fit(index, sample))
        combined = sum(
            weight * value for weight, value in zip(self.weights[-1], self.known, strict=True)
        )
        assert isinstance(combined, Tensor)
        return combined.view_as(velocity).to(velocity.dtype)

    def _fit(self, index: int, sample: Tensor) -> Weights:
        stop = next((step for step in self.path if step > index), self.full.steps)
        span = self.full.sigmas[stop] - self.full.sigmas[index]
        wanted = self.full.latents[stop].to(sample.device) - sample.flatten(1).float()
        vectors = torch.stack([*self.known, wanted / span]).flatten(1).double()
        gram = (vectors @ vectors.T / vectors.shape[1]).cpu().numpy()
        target = np.zeros(len(vectors))
        target[-1] = 1.0
        weights = fit_weights(gram, target, tuple(range(len(self.known))))
        return tuple(round(float(weight), 5) for weight in weights)


def fit_closed_loop(
    sample: Callable[[Sequence[int]], Tensor],
    scheduler: Any,
    full: Trajectories,
    path: Sequence[int],
    *,
    order: int,
    batch: int,
    objective: Objective | None = None,
) -> tuple[tuple[Weights, ...], float]:
    """(weights of each computed step, what the objective says of these runs' final latents).

    `sample(ids)` runs those prompts under a plan that computes the steps of `path`. Weights are
    fitted over a batch and averaged over batches. Without an objective, the relative error.
    """
    objective = objective or relative_error(full.latents[-1])
    count = full.velocities.shape[1]
    fits: list[list[Weights]] = []
    finals: list[Tensor] = []
    for first in range(0, count, batch):
        ids = range(first, min(first + batch, count))
        loop = ClosedLoop(full.of(slice(ids.start, ids.stop)), path, order)
        with at_scheduler_step(scheduler, loop):
            finals.append(sample(ids).flatten(1).float().cpu())
        fits.append(loop.weights)
    averaged = tuple(
        tuple(round(float(value), 5) for value in np.mean([fit[k] for fit in fits], axis=0))
        for k in range(len(fits[0]))
    )
    return averaged, objective(torch.cat(finals))
