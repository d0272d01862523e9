"""Which K of N steps to compute: what leaving a step for a later one costs, and the search.

Over a gap from step i to step j the full run moves by S_ij = Σ_{m=i}^{j-1} Δσ_m v_m; a plan moves
by Δσ_ij · Σ_k w_k u_k, with u_k the newest computed velocities and w fitted by least squares over
all calibration prompts. Both are linear in the N recorded velocities, so every error is a vector of
N coefficients and its squared norm a quadratic form in their N×N Gram matrix: no latent is touched
while searching. The cost conditioned on earlier key steps follows DPCache (arXiv:2602.22654).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hasten.calibration.trajectories import Trajectories
from hasten.passes.cache.predict import WEIGHTS

Array = NDArray[np.float64]
LONGEST_GAP = 4.0  # times the mean gap
RIDGE = 1e-4  # of the newest velocity's squared norm: pulls the weights towards plain reuse


def gram_matrix(trajectories: Trajectories) -> Array:
    """N×N mean inner products of the velocities, over prompts and latent values."""
    velocities = trajectories.velocities.flatten(1).double()
    gram: Array = (velocities @ velocities.T / velocities.shape[1]).numpy()
    return gram


class GapCosts:
    """Errors of gaps, each computed once: with fitted weights, or as a predictor fills them."""

    def __init__(
        self, gram: Array, sigmas: tuple[float, ...], predictor: str | None = None
    ) -> None:
        self.gram = gram
        self.sigmas = np.asarray(sigmas)
        self.predictor = predictor
        self._known: dict[tuple[int, ...], Array] = {}

    def error(self, stop: int, known: tuple[int, ...]) -> Array:
        """Coefficients (N) of the error made from step known[0] to step `stop`; `known` are the
        computed steps whose velocities it combines, newest first."""
        key = (stop, *known)
        if key not in self._known:
            self._known[key] = self._fit(stop, known)
        return self._known[key]

    def norm(self, coefficients: Array) -> float:
        """Root mean square error that these coefficients of velocities stand for."""
        return math.sqrt(max(0.0, float(coefficients @ self.gram @ coefficients)))

    def _fit(self, stop: int, known: tuple[int, ...]) -> Array:
        start = known[0]
        wanted = np.zeros(len(self.gram))
        wanted[start:stop] = np.diff(self.sigmas)[start:stop]
        if self.predictor is not None:
            return self._predicted(stop, known) - wanted
        span = self.sigmas[stop] - self.sigmas[start]
        weights = fit_weights(self.gram, wanted / span, known)
        made = np.zeros_like(wanted)
        made[list(known)] = weights * span
        return made - wanted

    def _predicted(self, stop: int, known: tuple[int, ...]) -> Array:
        weigh = WEIGHTS[str(self.predictor)]
        made = np.zeros(len(self.gram))
        levels = [float(self.sigmas[step]) for step in known]
        for step in range(known[0], stop):
            weights = weigh(levels, float(self.sigmas[step]))
            span = self.sigmas[step + 1] - self.sigmas[step]
            for known_step, weight in zip(known, weights, strict=False):
                made[known_step] += weight * span
        return made


def fit_weights(gram: Array, target: Array, known: tuple[int, ...]) -> Array:
    """Weights w (newest first) that bring Σ w_k v_known[k] closest to Σ target_m v_m.

    Least squares with a ridge towards plain reuse, w = (1, 0, …), solved from the Gram matrix.
    """
    among = gram[np.ix_(known, known)]
    ridge = RIDGE * gram[known[0], known[0]] * np.eye(len(known))
    prior = np.eye(len(known))[0]
    solution: Array = np.linalg.solve(among + ridge, gram[list(known)] @ target + ridge @ prior)
    return solution


def best_path(costs: GapCosts, steps: int, budget: int, power: float = 1.0) -> tuple[int, ...]:
    """K steps, from step 0, that minimise the sum of the gaps' errors, each to a power.

    Power 1 is as if they added up, 2 as if they were orthogonal; the worst gap counts more with 2.

    A gap's error depends on the computed step before it, so the states of the dynamic programme
    are pairs (previous, current); O(K · N · gap²).
    """
    longest = max(2, int(LONGEST_GAP * steps / budget))
    # best[(previous, current)] = (cost so far, path)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(-1, 0): (0.0, (0,))}
    for _ in range(budget - 1):
        following: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (previous, current), (cost, path) in best.items():
            known = (current,) if previous < 0 else (current, previous)
            for stop in range(current + 1, min(current + longest, steps - 1) + 1):
                reached = cost + math.pow(costs.norm(costs.error(stop, known)), power)
                if reached < following.get((current, stop), (np.inf, ()))[0]:
                    following[(current, stop)] = (reached, (*path, stop))
        best = following

    def finished(item: tuple[tuple[int, int], tuple[float, tuple[int, ...]]]) -> float:
        (previous, current), (cost, _) = item
        known = (current,) if previous < 0 else (current, previous)
        return cost + math.pow(costs.norm(costs.error(steps, known)), power)

    return min(best.items(), key=finished)[1][1]


def path_cost(costs: GapCosts, path: tuple[int, ...], steps: int) -> float:
    """What `best_path` minimises at power 1: the sum of the gaps' errors."""
    total = 0.0
    for number, start in enumerate(path):
        stop = path[number + 1] if number + 1 < len(path) else steps
        known = (start,) if number == 0 else (start, path[number - 1])
        total += costs.norm(costs.error(stop, known))
    return total


def neighbours(path: tuple[int, ...], steps: int, reach: int) -> Iterator[tuple[int, ...]]:
    """Paths in which one computed step, other than the first, is up to `reach` steps elsewhere."""
    for number in range(1, len(path)):
        low = path[number - 1]
        high = path[number + 1] if number + 1 < len(path) else steps
        for shift in (*range(-reach, 0), *range(1, reach + 1)):
            if low < path[number] + shift < high:
                yield (*path[:number], path[number] + shift, *path[number + 1 :])
