"""Finds a method's best setting within a budget. Uses neither torch nor models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["gentlest", "geometric"]

Candidate = TypeVar("Candidate")


def geometric(low: float, high: float, count: int) -> list[float]:
    """`count` values from low to high, each a constant factor above the one before."""
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]


def gentlest(
    candidates: Sequence[Candidate],
    limit: float,
    cost: Callable[[Candidate], float],
    guess: int | None = None,
) -> int | None:
    """Index of the first of `candidates` that costs at most `limit`; None if there is none.

    Costs fall (or stay) from one to the next: steps that double lead from `guess` (by default the
    middle) to both sides of the limit, bisection to the place. About 2 log2(distance) calls.
    """
    low, high = -1, len(candidates)  # above the limit, within it; beyond the ends by default
    probe, stride = guess, 1
    if probe is None:
        probe, stride = len(candidates) // 2, len(candidates)
    while high - low > 1:
        if cost(candidates[probe]) <= limit:
            high, ahead = probe, probe - stride
        else:
            low, ahead = probe, probe + stride
        stride *= 2
        probe = ahead if low < ahead < high else (low + high) // 2
    return high if high < len(candidates) else None
