"""Predictors: weights that are exact on what they claim to be exact on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.passes.cache.predict import WEIGHTS, combine, damped, linear, reuse

sigmas = st.floats(0.01, 1, allow_nan=False)


def test_reuse_returns_the_newest_output_itself() -> None:
    outputs = [torch.randn(3), torch.randn(3)]
    assert combine(outputs, reuse([0.8, 0.9], 0.1)) is outputs[0]


@given(first=sigmas, second=sigmas, target=sigmas, slope=st.floats(-3, 3), level=st.floats(-3, 3))
def test_linear_is_exact_on_lines(
    first: float, second: float, target: float, slope: float, level: float
) -> None:
    if abs(first - second) < 1e-2:
        return
    line = lambda sigma: torch.tensor([level + slope * sigma], dtype=torch.float64)  # noqa: E731
    weights = linear([second, first], target)
    predicted = combine([line(second), line(first)], weights)
    scale = 1 + abs(target - second) / abs(first - second)
    assert predicted.item() == pytest.approx(line(target).item(), abs=3e-6 * scale)


@given(known=st.lists(sigmas, min_size=1, max_size=4, unique=True), target=sigmas)
def test_damped_is_half_way_from_reuse_to_linear(known: list[float], target: float) -> None:
    values = [torch.tensor([value], dtype=torch.float64) for value in (0.7, -0.2, 1.0, 2.0)]
    values = values[: len(known)]
    ends = [combine(values, weigh(known, target)).item() for weigh in (reuse, linear)]
    middle = combine(values, damped(known, target)).item()
    assert middle == pytest.approx(sum(ends) / 2, rel=1e-5, abs=1e-5)


@given(known=st.lists(sigmas, min_size=1, max_size=4), target=sigmas)
def test_weights_of_every_predictor_sum_to_one(known: list[float], target: float) -> None:
    """A constant velocity is predicted exactly."""
    for weigh in WEIGHTS.values():
        weights = weigh(known, target)
        assert sum(weights) == pytest.approx(1, abs=1e-6 * max(1, *map(abs, weights)))
        assert len(weights) <= max(2, len(known))


def test_linear_with_one_output_known_reuses_it() -> None:
    assert linear([0.9], 0.5) == (1.0,)
    assert linear([0.9, 0.9], 0.5) == (1.0,)
    assert linear([0.5, 0.9], 0.5) == (1.0,)
    only = torch.randn(3)
    assert combine([only], (1.5, -0.5)) is only


def test_combining_sums_in_float32_and_returns_the_outputs_dtype() -> None:
    before = torch.tensor([1.0, 256.0], dtype=torch.bfloat16)
    last = torch.tensor([1.0078125, 258.0], dtype=torch.bfloat16)
    predicted = combine([last, before], linear([0.5, 1.0], 0.25))
    assert predicted.dtype == torch.bfloat16
    exact = last.double() + 0.5 * (last.double() - before.double())
    assert torch.equal(predicted, exact.to(torch.bfloat16))
