"""Shapes for the kernels' tests, and how far codes may lie from what they stand for."""

from __future__ import annotations

import torch
from hypothesis import Phase
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels.quantize import FP8, LIMITS
from hasten.kernels.streams import Streams

NO_SHRINKING = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STREAMS = st.builds(Streams, st.integers(1, 3), st.integers(0, 4), st.integers(1, 5))
SEEDS = st.integers(0, 2**31)
CODES = st.sampled_from([FP8, torch.int8])


def assert_codes_stand_for(codes: Tensor, scales: Tensor, exact: Tensor) -> None:
    """Codes times scales lie within half a step of their dtype from the exact values.

    Triton's interpreter loses the carry where rounding up reaches a power of two and gives half of
    it, and cuts subnormal codes off; those are let through there, and only there.
    """
    assert scales.shape == (len(exact), 1)
    largest = exact.abs().amax(1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(scales.double(), largest / LIMITS[codes.dtype], rtol=1e-5, atol=0)
    if codes.dtype == torch.int8:
        assert ((codes.double() * scales - exact).abs() <= 0.501 * scales).all()
        return
    assert codes.dtype == torch.float8_e4m3fn
    step = torch.maximum(exact.abs() / 8, scales.double() * 2**-9)
    values = codes.double() * scales.double()
    near = (values - exact).abs() <= 0.51 * step
    if not codes.is_cuda:
        near |= (2 * values - exact).abs() <= 0.51 * step
        subnormal = exact.abs() < 2**-6 * scales.double()
        near |= subnormal & ((values - exact).abs() <= 1.01 * step)
    assert near.all()
