"""What stands in for the transformer's output on a skipped step.

A predictor is a function (history, sigma) -> output. `history` holds the outputs of the last
computed steps as (sigma, tensor), oldest first; `sigma` is the skipped step's noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["PREDICTORS", "Point", "linear", "reuse"]

Point = tuple[float, Tensor]
Predictor = Callable[[Sequence[Point], float], Tensor]


def reuse(history: Sequence[Point], sigma: float) -> Tensor:
    """The last computed output as it is: explicit Euler with a longer step."""
    return history[-1][1]


def linear(history: Sequence[Point], sigma: float) -> Tensor:
    """The line through the last two computed outputs, in sigma, evaluated at the skipped step.

    v(σ) = v_i + (σ − σ_i) (v_i − v_p)/(σ_i − σ_p): two-step Adams–Bashforth on an uneven grid.
    Computed in float32, returned in the outputs' dtype. With one output known it is `reuse`.
    """
    if len(history) < 2 or history[-1][0] == history[-2][0]:
        return reuse(history, sigma)
    (sigma_before, before), (sigma_last, last) = history[-2], history[-1]
    weight = (sigma - sigma_last) / (sigma_last - sigma_before)
    value = last.float() + weight * (last.float() - before.float())
    return value.to(last.dtype)


# name -> (function, how many computed outputs it looks at)
PREDICTORS: dict[str, tuple[Predictor, int]] = {"reuse": (reuse, 1), "linear": (linear, 2)}
