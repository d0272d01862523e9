"""Which K of N steps to compute: dynamic programming, and the paths near a path."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hasten.calibration.cost import GapCosts

__all__ = ["best_path", "neighbours", "path_cost"]

LONGEST_GAP = 4.0  # times the mean gap


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
