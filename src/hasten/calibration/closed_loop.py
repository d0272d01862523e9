"""Fits a plan's weights while the plan runs, so that each gap also corrects earlier errors.

Let x̂_i be the sample of the running plan at a computed step i, and x_j that of the full run at the
next computed step j. The weights of the gap from i to j minimise the distance from
x̂_i + (σ_j − σ_i) Σ_k w_k v_k to x_j. Starting from x̂_i, not from x_i, prevents errors from
accumulating.
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
    """Replaces the velocity of each step of one batch, and fits weights at computed steps.

    Args:
        full: The full runs of the same prompts.
        path: The computed steps, in ascending order, the first one 0.
        order: How many computed velocities a gap combines at most.
    """

    def __init__(self, full: Trajectories, path: Sequence[int], order: int) -> None:
        self.full = full
        self.path = list(path)
        self.order = order
        self.known: list[Tensor] = []  # newest first, P×D float32
        self.weights: list[Weights] = []

    def __call__(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """The velocity to use at step `index` instead of the pipeline's, in the same shape."""
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
        change = self.full.latents[stop].to(sample.device) - sample.flatten(1).float()
        vectors = torch.stack([*self.known, change / span]).flatten(1).double()
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
    """Fit the weights of a plan on all prompts of `full`.

    Weights are fitted per batch and averaged over the batches.

    Args:
        sample: Samples the prompts with the given ids under a plan that computes the steps of
            `path`, and returns their final latents.
        scheduler: The scheduler of the pipeline that `sample` calls.
        full: The full runs of all prompts.
        path: The computed steps, in ascending order, the first one 0.
        order: How many computed velocities a gap combines at most.
        batch: Number of prompts per call of `sample`.
        objective: Rates the final latents; by default, by their relative error.

    Returns:
        The weights of each computed step, and the objective's value during the fit.
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
