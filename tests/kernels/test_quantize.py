"""Codes and scales: the nearest codes there are, for any finite input, and nothing hidden."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from hasten.kernels.quantize import FP8, TINY, dequantize, quantize_rows, quantize_tensor

LIMITS = {FP8: 448.0, torch.int8: 127.0}
dtypes = pytest.mark.parametrize("dtype", list(LIMITS), ids=["fp8", "int8"])
both = pytest.mark.parametrize("quantize", [quantize_rows, quantize_tensor])

matrices = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=8),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
).map(torch.from_numpy)


def representable(dtype: torch.dtype) -> Tensor:
    """Every value a code can have, rising, in float64; -128 is not used."""
    if dtype == torch.int8:
        return torch.arange(-127, 128, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.uint8).view(FP8).to(torch.float64)
    return values[values.isfinite()].unique()


def nearest_distance(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each value is from the nearest that a code can have."""
    return (exact.unsqueeze(-1) - representable(dtype)).abs().amin(-1)


@dtypes
@both
@settings(deadline=None)
@given(x=matrices)
def test_each_code_is_a_nearest_one(quantize: Any, dtype: torch.dtype, x: Tensor) -> None:
    codes, scale = quantize(x, dtype)
    assert codes.dtype == dtype
    assert codes.shape == x.shape
    exact = x.double() / scale.double()
    error = (codes.double() - exact).abs()
    # x / scale is rounded to float32 before it is rounded to a code.
    slack = 2.0**-23 * exact.abs() + 1e-30
    assert (
        error <= nearest_distance(exact.clamp(-LIMITS[dtype], LIMITS[dtype]), dtype) + slack
    ).all()


@both
@settings(deadline=None)
@given(x=matrices)
def test_the_error_is_at_most_half_a_unit_in_the_last_place(quantize: Any, x: Tensor) -> None:
    """FP8 e4m3: three bits of mantissa, exponents from -6, so units of 2^(e - 3)."""
    codes, scale = quantize(x)
    scaled = x.double() / scale.double()
    exponent = scaled.abs().clamp(min=2.0**-6).log2().floor()
    half_unit = 2.0 ** (exponent - 4) * scale.double()
    error = (dequantize(codes, scale, torch.float64) - x.double()).abs()
    assert (error <= half_unit * (1 + 1e-6) + 1e-37).all()


@settings(deadline=None)
@given(x=matrices)
def test_int8_is_off_by_half_a_step_at_most(x: Tensor) -> None:
    codes, scale = quantize_rows(x, torch.int8)
    error = (dequantize(codes, scale, torch.float64) - x.double()).abs()
    assert (error <= 0.5 * scale.double() * (1 + 1e-4)).all()


@dtypes
@both
@settings(deadline=None)
@given(x=matrices)
def test_scales_are_positive_and_the_largest_value_fits(
    quantize: Any, dtype: torch.dtype, x: Tensor
) -> None:
    codes, scale = quantize(x, dtype)
    assert scale.dtype == torch.float32
    assert (scale > 0).all()
    assert scale.shape == ((len(x), 1) if quantize is quantize_rows else ())
    largest = x.abs().amax(1, keepdim=True) if quantize is quantize_rows else x.abs().amax()
    torch.testing.assert_close(scale, largest.clamp(min=TINY) / LIMITS[dtype])
    assert codes.float().abs().amax() <= LIMITS[dtype]


@dtypes
@both
@settings(deadline=None)
@given(x=matrices, power=st.integers(-20, 20))
def test_powers_of_two_change_the_scale_only(
    quantize: Any, dtype: torch.dtype, x: Tensor, power: int
) -> None:
    x = torch.where(x.abs() < 1e-3, 0, x) / 1e15  # neither overflows nor falls under TINY
    x[:, 0] = 1
    codes, scale = quantize(x, dtype)
    more_codes, more_scale = quantize(x * 2.0**power, dtype)
    assert torch.equal(more_codes.float(), codes.float())
    assert torch.equal(more_scale, scale * 2.0**power)


@dtypes
def test_rows_of_zeros_stay_zero_and_touch_no_other(dtype: torch.dtype) -> None:
    x = torch.randn(5, 16)
    x[2] = 0
    codes, scale = quantize_rows(x, dtype)
    assert (dequantize(codes, scale, torch.float32)[2] == 0).all()
    assert scale.isfinite().all()
    alone, its_scale = quantize_rows(x[3], dtype)
    assert torch.equal(alone.float(), codes[3:4].float())
    assert torch.equal(its_scale, scale[3:4])
    all_codes, one_scale = quantize_tensor(torch.zeros(2, 3), dtype)
    assert (all_codes.float() == 0).all()
    assert one_scale > 0


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_passed_on_and_stays_in_its_row(
    dtype: torch.dtype, bad: float
) -> None:
    x = torch.randn(4, 16)
    x[1, 3] = bad
    _, scale = quantize_rows(x, dtype)
    assert scale.isfinite().flatten().tolist() == [True, False, True, True]
    assert not quantize_tensor(x, dtype)[1].isfinite()


@pytest.mark.parametrize("given_dtype", [torch.float16, torch.bfloat16, torch.float64])
@dtypes
def test_any_float_any_leading_shape(dtype: torch.dtype, given_dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 16).to(given_dtype)
    codes, scale = quantize_rows(x, dtype)
    assert codes.shape == (6, 16)
    assert scale.shape == (6, 1)
    expected, expected_scale = quantize_rows(x.to(torch.float64), dtype)
    torch.testing.assert_close(scale, expected_scale)
    assert (codes.float() != expected.float()).float().mean() < 0.05  # ties, decided by rounding
    assert quantize_rows(x[0, 0], dtype)[0].shape == (1, 16)


def test_dequantized_values_come_in_the_dtype_asked_for() -> None:
    codes, scale = quantize_rows(torch.randn(3, 8))
    whole = dequantize(codes, scale, torch.bfloat16)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(whole.float(), codes.float() * scale, rtol=2**-8, atol=0)
