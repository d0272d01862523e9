"""The last step before codes are stored, for Triton's kernels."""

from __future__ import annotations

from hasten.kernels.triton_or_none import jit, tl

__all__ = ["to_codes"]


@jit
def to_codes(scaled, INT8: tl.constexpr):
    """Values within the codes' limit, ready for the cast: FP8's rounds by itself, int8's cuts off.

    Adding and taking away 1.5 · 2²³ rounds a float32 to the nearest whole number, ties to even.
    """
    if INT8:
        scaled = (scaled + 12582912.0) - 12582912.0
    return scaled
