"""Carry a schedule over to other noise levels: the same density of computed steps in sigma."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["resampled"]


def resampled(
    compute: Sequence[int],
    learned: Sequence[float],
    sigmas: Sequence[float],
    *,
    count: int | None = None,
) -> list[int]:
    """Steps to compute on the grid `sigmas` (N' + 1 falling entries, the last is the end).

    `compute` are indices into the grid `learned` (N falling entries). The learned steps define a
    cumulative count over sigma, linear between them; the new steps stand where that count, scaled
    to `count` steps (by default as large a share of the steps as was learned), passes whole
    numbers. Always distinct, rising, and beginning with step 0.
    """
    steps = len(sigmas) - 1
    first = sigmas[0]
    nodes = [learned[step] for step in compute]
    total = _position(nodes, 0.0) - _position(nodes, first)
    if count is None:
        covered = len(learned) - _position(learned, first)
        count = round(total * steps / covered)
    count = max(1, min(steps, count))
    start = _position(nodes, first)
    passed = [(_position(nodes, sigma) - start) * count / total for sigma in sigmas[:-1]]
    chosen: list[int] = []
    for number in range(count):
        nearest = min(bisect_left(passed, number - 0.5), steps - 1)
        latest = steps - (count - number)  # leave room for those still to come
        earliest = chosen[-1] + 1 if chosen else 0
        closest = min(
            range(nearest, min(nearest + 2, steps)), key=lambda step: abs(passed[step] - number)
        )
        chosen.append(min(max(closest, earliest), latest) if number else 0)
    return chosen


def _position(levels: Sequence[float], sigma: float) -> float:
    """Index of `sigma` in falling `levels` continued to 0, linear in between, 0 above the first."""
    if sigma >= levels[0]:
        return 0.0
    extended = [*levels, 0.0] if levels[-1] > 0 else list(levels)
    for index, (high, low) in enumerate(itertools.pairwise(extended)):
        if sigma >= low:
            return index + (high - sigma) / (high - low)
    return float(len(extended) - 1)
