"""Predictors: exact on what they claim to be exact on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.passes.cache.predict import linear, reuse

sigmas = st.floats(0.01, 1, allow_nan=False)


def test_reuse_returns_the_last_output_itself() -> None:
    outputs = [(0.9, torch.randn(3)), (0.8, torch.randn(3))]
    assert reuse(outputs, 0.1) is outputs[-1][1]


@given(first=sigmas, second=sigmas, target=sigmas, slope=st.floats(-3, 3), level=st.floats(-3, 3))
def test_linear_is_exact_on_lines(
    first: float, second: float, target: float, slope: float, level: float
) -> None:
    if abs(first - second) < 1e-2:
        return
    line = lambda sigma: torch.tensor([level + slope * sigma], dtype=torch.float32)  # noqa: E731
    predicted = linear([(first, line(first)), (second, line(second))], target)
    assert predicted.item() == pytest.approx(line(target).item(), abs=2e-3)


def test_linear_with_one_output_known_reuses_it() -> None:
    only = torch.randn(3)
    assert linear([(0.9, only)], 0.5) is only
    assert linear([(0.9, torch.randn(3)), (0.9, only)], 0.5) is only


def test_linear_computes_in_float32_and_returns_the_outputs_dtype() -> None:
    before = torch.tensor([1.0, 256.0], dtype=torch.bfloat16)
    last = torch.tensor([1.0078125, 258.0], dtype=torch.bfloat16)
    predicted = linear([(1.0, before), (0.5, last)], 0.25)
    assert predicted.dtype == torch.bfloat16
    exact = last.double() + 0.5 * (last.double() - before.double())
    assert torch.equal(predicted, exact.to(torch.bfloat16))
