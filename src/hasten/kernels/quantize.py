"""Eight-bit codes with one scale per row or per tensor, such that the largest value just fits.

    scale = max(amax, TINY) / limit    codes = round(clamp(x / scale)), to nearest, ties to even

limit: 448 for float8_e4m3fn (Micikevicius et al., arXiv:2209.05433), 127 for int8, which leaves
-128 unused so that codes are symmetric. Arithmetic is float32, or float64 where x is.

Everything is plain torch, so that torch.compile fuses it into the operation that computed x.
Nothing waits for the device, so non-finite values do not raise an error. They propagate: the scale
of their row (or tensor) is not finite, nor is any product with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
TINY = 1e-12  # the smallest maximum, so that the codes of zeros are zero, not NaN
LIMITS = {FP8: 448.0, torch.int8: 127.0}  # largest code


def quantize_rows(x: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """Quantise x (… × K, flattened to M × K) with one scale per row.

    Returns:
        Codes, M × K of `dtype`, and scales, M × 1 in float32.
    """
    rows = _exact(x)
    return _quantize(rows, rows.abs().amax(dim=1, keepdim=True), dtype)


def quantize_tensor(x: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """Quantise x (… × K, flattened to M × K) with one scale.

    Returns:
        Codes, M × K of `dtype`, and the scale, 0-dim in float32.
    """
    rows = _exact(x)
    return _quantize(rows, rows.abs().amax(), dtype)


def fp8_scale(amax: float, device: torch.device) -> Tensor:
    """The scale (0-dim, float32) with which values up to ±`amax` just fit into FP8."""
    largest = torch.tensor(amax, dtype=torch.float32, device=device)
    return largest.clamp(min=TINY) / LIMITS[FP8]


def fp8_codes(x: Tensor, scale: Tensor) -> Tensor:
    """FP8 codes of x, in x's shape, with a given float32 scale.

    Values beyond 448 · scale, including infinity, become ±448; NaN stays NaN.
    """
    limit = LIMITS[FP8]
    return (x.to(torch.promote_types(x.dtype, scale.dtype)) / scale).clamp(-limit, limit).to(FP8)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (M × K) times their scale (M × 1 or 0-dim), computed in float32, in `dtype`."""
    return (codes.to(torch.float32) * scale).to(dtype)


def _exact(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.to(torch.float32)


def _quantize(rows: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    limit = LIMITS[dtype]
    scale = (amax.clamp(min=TINY) / limit).to(torch.float32)
    codes = rows / scale
    if dtype == torch.int8:
        codes = codes.round()
    return codes.clamp(-limit, limit).to(dtype), scale
