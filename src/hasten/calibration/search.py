"""Search for the K of N steps to compute, and the cost of the gaps between them.

Over a gap from step i to step j, the full run moves by S_ij = Σ_{m=i}^{j-1} Δσ_m v_m. A plan moves
by Δσ_ij · Σ_k w_k u_k, where u_k are the newest computed velocities and w is fitted by least
squares over all calibration prompts. Both are linear in the N recorded velocities. Every error is
therefore a vector of N coefficients, and its squared norm is a quadratic form in the N×N Gram
matrix of the velocities, so the search reads no latents. The cost conditioned on earlier computed
steps follows DPCache (arXiv:2602.22654).
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
RIDGE = 1e-4  # of the newest velocity's squared norm; regularises towards plain reuse


def gram_matrix(trajectories: Trajectories) -> Array:
    """Inner products of the N velocities, N×N, averaged over prompts and latent values."""
    velocities = trajectories.velocities.flatten(1).double()
    gram: Array = (velocities @ velocities.T / velocities.shape[1]).numpy()
    return gram


class GapCosts:
    """Errors of gaps, each computed once.

    Args:
        gram: Inner products of the velocities, N×N.
        sigmas: The N + 1 noise levels.
        predictor: Name of the predictor that fills gaps; None for fitted weights.
    """

    def __init__(
        self, gram: Array, sigmas: tuple[float, ...], predictor: str | None = None
    ) -> None:
        self.gram = gram
        self.sigmas = np.asarray(sigmas)
        self.predictor = predictor
        self._known: dict[tuple[int, ...], Array] = {}

    def error(self, stop: int, known: tuple[int, ...]) -> Array:
        """The error of the gap from step `known[0]` to step `stop`, as N coefficients.

        Args:
            stop: The next computed step, or N.
            known: The computed steps whose velocities the gap combines, newest first.
        """
        key = (stop, *known)
        if key not in self._known:
            self._known[key] = self._fit(stop, known)
        return self._known[key]

    def norm(self, coefficients: Array) -> float:
        """The root mean square of the combination of velocities with these N coefficients."""
        return math.sqrt(max(0.0, float(coefficients @ self.gram @ coefficients)))

    def _fit(self, stop: int, known: tuple[int, ...]) -> Array:
        start = known[0]
        target = np.zeros(len(self.gram))
        target[start:stop] = np.diff(self.sigmas)[start:stop]
        if self.predictor is not None:
            return self._predicted(stop, known) - target
        span = self.sigmas[stop] - self.sigmas[start]
        weights = fit_weights(self.gram, target / span, known)
        predicted = np.zeros_like(target)
        predicted[list(known)] = weights * span
        return predicted - target

    def _predicted(self, stop: int, known: tuple[int, ...]) -> Array:
        weigh = WEIGHTS[str(self.predictor)]
        predicted = np.zeros(len(self.gram))
        levels = [float(self.sigmas[step]) for step in known]
        for step in range(known[0], stop):
            weights = weigh(levels, float(self.sigmas[step]))
            span = self.sigmas[step + 1] - self.sigmas[step]
            for known_step, weight in zip(known, weights, strict=False):
                predicted[known_step] += weight * span
        return predicted


def fit_weights(gram: Array, target: Array, known: tuple[int, ...]) -> Array:
    """Fit weights by ridge regression towards plain reuse, w = (1, 0, …), on the Gram matrix.

    Args:
        gram: Inner products of the velocities, N×N.
        target: N coefficients of the velocity to approximate.
        known: Indices of the velocities to combine, newest first.

    Returns:
        The weights w that minimise the distance from Σ_k w_k v_known[k] to Σ_m target_m v_m.
    """
    among = gram[np.ix_(known, known)]
    ridge = RIDGE * gram[known[0], known[0]] * np.eye(len(known))
    prior = np.eye(len(known))[0]
    solution: Array = np.linalg.solve(among + ridge, gram[list(known)] @ target + ridge @ prior)
    return solution


def best_path(costs: GapCosts, steps: int, budget: int, power: float = 1.0) -> tuple[int, ...]:
    """Find the K steps that minimise the sum of the gaps' errors, each raised to `power`.

    Power 1 assumes that errors add up, power 2 that they are orthogonal; power 2 gives the worst
    gap more weight. The error of a gap depends on the computed step before it, so the states of the
    dynamic programme are pairs (previous, current). The run time is O(K · N · gap²).

    Args:
        costs: Errors of the gaps.
        steps: N, the number of steps of a run.
        budget: K, the number of steps to compute.
        power: Exponent of each error.

    Returns:
        The computed steps in ascending order, the first one 0.
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
    """The sum of the errors of a path's gaps, which `best_path` minimises at power 1."""
    total = 0.0
    for number, start in enumerate(path):
        stop = path[number + 1] if number + 1 < len(path) else steps
        known = (start,) if number == 0 else (start, path[number - 1])
        total += costs.norm(costs.error(stop, known))
    return total


def neighbours(path: tuple[int, ...], steps: int, reach: int) -> Iterator[tuple[int, ...]]:
    """Paths that differ in one computed step, not the first, which moves by up to `reach`."""
    for number in range(1, len(path)):
        low = path[number - 1]
        high = path[number + 1] if number + 1 < len(path) else steps
        for shift in (*range(-reach, 0), *range(1, reach + 1)):
            if low < path[number] + shift < high:
                yield (*path[:number], path[number] + shift, *path[number + 1 :])
