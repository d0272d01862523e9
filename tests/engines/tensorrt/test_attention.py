"""The scale of attention as two constants of sixteen bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engines.tensorrt.attention import BITS, factors

DTYPES = {"BFLOAT16": torch.bfloat16, "FLOAT16": torch.float16}


@settings(deadline=None)
@given(st.integers(1, 512), st.sampled_from(sorted(BITS)))
def test_both_are_of_the_dtype_and_beat_two_equal_ones(head_dim: int, name: str) -> None:
    """The bounds on the error are the worst of these head sizes, rounded up."""
    scale, dtype = head_dim**-0.5, DTYPES[name]
    pair = factors(scale, BITS[name])
    for factor in pair:
        assert float(torch.tensor(factor, dtype=dtype)) == factor
        assert math.sqrt(scale) / 2 <= factor <= math.sqrt(scale) * 2
    equal = float(torch.tensor(math.sqrt(scale), dtype=dtype))
    error = abs(pair[0] * pair[1] / scale - 1)
    assert error <= abs(equal * equal / scale - 1)
    assert error < {"BFLOAT16": 2.5e-4, "FLOAT16": 4e-6}[name]


@pytest.mark.parametrize("head_dim", [16, 64])
def test_powers_of_two_are_exact(head_dim: int) -> None:
    first, second = factors(head_dim**-0.5, 8)
    assert first * second == head_dim**-0.5
