"""Finding each method's best setting within a budget. Pure: no torch, no models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["gentlest", "geometric", "halve"]

Candidate = TypeVar("Candidate")


def geometric(low: float, high: float, count: int) -> list[float]:
    """`count` values from low to high, each a constant factor above the one before."""
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]


def gentlest(
    candidates: Sequence[Candidate], limit: float, cost: Callable[[Candidate], float]
) -> Candidate | None:
    """The first of `candidates` that costs at most `limit`; None where even the last costs more.

    Costs fall (or stay) from one to the next: bisection, about log2(len) + 1 calls of `cost`.
    """
    if cost(candidates[-1]) > limit:
        return None
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if cost(candidates[middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    return candidates[high]


def halve(
    candidates: Sequence[Candidate],
    error: Callable[[Candidate, int], float],
    stages: Sequence[tuple[int, int]],
) -> Candidate:
    """Successive halving: a stage is (prompts to judge on, candidates to keep); least error wins.

    The last stage keeps one. A stage that would drop nothing is left out, unless it is the last
    and there is a choice to make.
    """
    alive = list(candidates)
    for prompts, keep in stages:
        if len(alive) > keep:
            alive = sorted(alive, key=lambda candidate: error(candidate, prompts))[:keep]
    return alive[0]
