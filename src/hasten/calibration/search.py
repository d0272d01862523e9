"""Which K of N steps to compute: dynamic programming, then local search on the total error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from hasten.calibration.cost import Array, GapCosts

__all__ = ["best_path", "improved", "total_error"]

LONGEST_GAP = 4.0  # times the mean gap


def best_path(costs: GapCosts, steps: int, budget: int) -> tuple[int, ...]:
    """K steps, from step 0, that minimise the sum of the gaps' errors.

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
                reached = cost + costs.norm(costs.error(stop, known))
                if reached < following.get((current, stop), (np.inf, ()))[0]:
                    following[(current, stop)] = (reached, (*path, stop))
        best = following

    def finished(item: tuple[tuple[int, int], tuple[float, tuple[int, ...]]]) -> float:
        (previous, current), (cost, _) = item
        known = (current,) if previous < 0 else (current, previous)
        return cost + costs.norm(costs.error(steps, known))

    return min(best.items(), key=finished)[1][1]


def total_error(costs: GapCosts, path: tuple[int, ...], steps: int, gain: Array) -> float:
    """Error of the final latents if every gap's error travelled to the end scaled by `gain`.

    Errors of different gaps add up as vectors: neighbouring gaps often cancel.
    """
    total = np.zeros(steps)
    for number, start in enumerate(path):
        stop = path[number + 1] if number + 1 < len(path) else steps
        known = tuple(reversed(path[max(0, number + 1 - costs.order) : number + 1]))
        total += gain[start] * costs.error(stop, known)
    return costs.norm(total)


def improved(
    path: tuple[int, ...], steps: int, objective: Callable[[tuple[int, ...]], float], reach: int = 3
) -> tuple[int, ...]:
    """Move single steps (by up to `reach`) or pairs while that lowers the objective."""
    best = objective(path)
    moved = True
    while moved:
        moved = False
        for candidate in neighbours(path, steps, reach):
            value = objective(candidate)
            if value < best * (1 - 1e-6):
                best, path, moved = value, candidate, True
    return path


def neighbours(path: tuple[int, ...], steps: int, reach: int) -> Iterator[tuple[int, ...]]:
    """Paths that differ by one moved step, or by one step taken out here and put in there."""
    for number in range(1, len(path)):
        low = path[number - 1]
        high = path[number + 1] if number + 1 < len(path) else steps
        for shift in itertools.chain(range(-reach, 0), range(1, reach + 1)):
            if low < path[number] + shift < high:
                yield (*path[:number], path[number] + shift, *path[number + 1 :])
    inside = set(path)
    for out in path[1:]:
        for new in range(1, steps):
            if new not in inside:
                yield tuple(sorted((inside - {out}) | {new}))
