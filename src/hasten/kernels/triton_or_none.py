"""What the Triton kernels share, and Triton itself where it is installed.

CPU builds of PyTorch come without it.
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
    """`triton.jit`, or the plain function where there is nothing to compile it."""
    return kernel if triton is None else triton.jit(kernel)


def available() -> bool:
    """Whether Triton can be imported."""
    return triton is not None


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least `value` (≥ 1): Triton's blocks have such sizes."""
    return 1 << (value - 1).bit_length()


@jit
def to_codes(scaled, INT8: tl.constexpr):
    """Values within the codes' limit, ready for the cast: FP8's rounds by itself, int8's cuts off.

    Adding and taking away 1.5 · 2²³ rounds a float32 to the nearest whole number, ties to even.
    """
    if INT8:
        scaled = (scaled + 12582912.0) - 12582912.0
    return scaled
