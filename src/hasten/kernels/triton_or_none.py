"""Triton if it is installed, and helpers of the Triton kernels.

CPU builds of PyTorch do not include Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
except ImportError:
    triton = None

tl: Any = getattr(triton, "language", None)


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit` if Triton is installed, else the function itself."""
    return kernel if triton is None else triton.jit(kernel)


def available() -> bool:
    """Whether Triton can be imported."""
    return triton is not None


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value` (≥ 1), as Triton's block sizes must be."""
    return 1 << (value - 1).bit_length()


@jit
def to_codes(scaled, INT8: tl.constexpr):
    """Prepare values within the codes' limit for the cast, which rounds for FP8 but not for int8.

    Adding and subtracting 1.5 · 2²³ rounds a float32 to the nearest whole number, ties to even.
    """
    if INT8:
        scaled = (scaled + 12582912.0) - 12582912.0
    return scaled
