"""Predictors: the output of a skipped step as a weighted sum of past outputs.

A predictor computes the weights from noise levels before the run starts. `known` are the noise
levels of the steps computed so far, newest first; `sigma` is that of the step to fill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


Weights = tuple[float, ...]


def reuse(known: Sequence[float], sigma: float) -> Weights:
    """Reuse the newest output: explicit Euler with a longer step."""
    return (1.0,)


def linear(known: Sequence[float], sigma: float) -> Weights:
    """Extrapolate the two newest outputs linearly in sigma.

    v(σ) = v_i + (σ − σ_i) (v_i − v_p)/(σ_i − σ_p): two-step Adams–Bashforth on an uneven grid.
    With one past output it equals `reuse`; on a computed step it gives that step's own output.
    """
    if len(known) < 2 or known[0] == known[1] or sigma == known[0]:
        return (1.0,)
    slope = (sigma - known[0]) / (known[0] - known[1])
    return (1.0 + slope, -slope)


def damped(known: Sequence[float], sigma: float) -> Weights:
    """The mean of `reuse` and `linear`, because full extrapolation overshoots over long gaps.

    This is the first-order term of HiCache's scaled Hermite basis (arXiv:2508.16984) with its
    contraction of 1/2, in sigma. On learned plans that compute less than half of the steps, it has
    a lower error than both `reuse` and `linear`.
    """
    weights = linear(known, sigma)
    if len(weights) == 1:
        return weights
    half = -weights[1] / 2
    return (1.0 + half, -half)


WEIGHTS: dict[str, Callable[[Sequence[float], float], Weights]] = {
    "reuse": reuse,
    "linear": linear,
    "damped": damped,
}


def combine(newest_first: Sequence[Tensor], weights: Weights) -> Tensor:
    """Σ weights[k] · newest_first[k], summed in float32 and returned in the outputs' dtype.

    A single weight of one returns the newest output itself, not a copy. The newest output is also
    returned if there are fewer outputs than weights.
    """
    newest = newest_first[0]
    if len(weights) > len(newest_first) or weights == (1.0,):
        return newest
    total = newest.float() * weights[0]
    for value, weight in islice(zip(newest_first, weights, strict=False), 1, None):
        total = total.add(value.float(), alpha=weight)
    return total.to(newest.dtype)
