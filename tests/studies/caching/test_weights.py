"""Candidate predictors: exact on the functions they are made for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from studies.caching.weights import (
    dynamic_mode,
    exponential,
    extrapolation,
    filled,
    hermite,
    integrated,
    reuse,
    taylor,
)

coefficients = st.lists(st.floats(-3, 3), min_size=1, max_size=4)
# Falling noise levels with gaps that a schedule could have.
gaps = st.lists(st.floats(0.02, 0.2), min_size=5, max_size=5)


def levels(gap: list[float]) -> list[float]:
    """Five levels and the end, newest (lowest) first, the end apart: known, stop."""
    falling = [1.0]
    for one in gap:
        falling.append(falling[-1] - one)
    return falling


def value(polynomial: list[float], at: float) -> float:
    return sum(c * at**power for power, c in enumerate(polynomial))


def mean(polynomial: list[float], low: float, high: float) -> float:
    def primitive(at: float) -> float:
        return sum(c * at ** (power + 1) / (power + 1) for power, c in enumerate(polynomial))

    return (primitive(high) - primitive(low)) / (high - low)


@given(coefficients, gaps)
def test_adams_bashforth_of_order_p_integrates_degree_p_less_one(
    polynomial: list[float], gap: list[float]
) -> None:
    *computed, stop = levels(gap)
    known = computed[::-1]
    weights = integrated(extrapolation(len(polynomial) - 1), known, stop)
    made = sum(w * value(polynomial, at) for w, at in zip(weights, known, strict=False))
    assert len(weights) == len(polynomial)
    assert made == pytest.approx(mean(polynomial, known[0], stop), rel=1e-6, abs=1e-6)


def test_adams_bashforth_has_its_textbook_weights_on_an_even_grid() -> None:
    known = [0.0, -1.0, -2.0, -3.0]
    assert integrated(extrapolation(1), known, 1.0) == pytest.approx([3 / 2, -1 / 2])
    assert integrated(extrapolation(2), known, 1.0) == pytest.approx([23 / 12, -16 / 12, 5 / 12])
    fourth = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    assert integrated(extrapolation(3), known, 1.0) == pytest.approx(fourth)


@given(coefficients, gaps)
def test_extrapolation_is_exact_on_its_polynomials(
    polynomial: list[float], gap: list[float]
) -> None:
    *computed, stop = levels(gap)
    known = computed[::-1]
    weights = extrapolation(len(polynomial) - 1)(known, stop)
    made = sum(w * value(polynomial, at) for w, at in zip(weights, known, strict=False))
    assert made == pytest.approx(value(polynomial, stop), rel=1e-6, abs=1e-6)


@given(gaps, st.integers(1, 5), st.integers(1, 4))
def test_every_predictor_keeps_a_constant(gap: list[float], count: int, order: int) -> None:
    *computed, stop = levels(gap)
    known = computed[::-1][:count]
    for weigh in (reuse, extrapolation(order), taylor(order), exponential(3.0)):
        assert sum(weigh(known, stop)) == pytest.approx(1.0)


def test_taylor_of_order_one_is_the_line_and_order_two_is_not_exact_on_squares() -> None:
    known = [4.0, 2.0, 0.0]
    assert taylor(1)(known, 5.0)[:2] == pytest.approx(extrapolation(1)(known, 5.0))
    made = sum(w * at**2 for w, at in zip(taylor(2)(known, 5.0), known, strict=True))
    assert made != pytest.approx(25.0)  # its factors are differences, not derivatives, at the node


@given(st.integers(0, 6), st.floats(-2, 2))
def test_hermite_follows_its_definition(number: int, x: float) -> None:
    explicit = sum(
        (-1) ** m * math.factorial(number) / (math.factorial(m) * math.factorial(number - 2 * m))
        * (2 * x) ** (number - 2 * m)
        for m in range(number // 2 + 1)
    )  # fmt: skip
    assert hermite(number, x) == pytest.approx(explicit, abs=1e-6)


@given(gaps, st.floats(-4, 4), st.floats(-2, 2), st.floats(0.1, 2))
def test_modes_are_exact_on_exponentials(
    gap: list[float], rate: float, offset: float, size: float
) -> None:
    assume(abs(rate) > 0.1)
    *computed, stop = levels(gap)
    known = computed[::-1]
    (weight,) = dynamic_mode(rate)(known, stop)
    assert weight * math.exp(rate * known[0]) == pytest.approx(math.exp(rate * stop))
    first, second = exponential(rate)(known, stop)
    values = [offset + size * math.exp(rate * at) for at in known[:2]]
    wanted = offset + size * math.exp(rate * stop)
    # The slope at a gap's middle is taken for its difference quotient: right to second order.
    slack = abs(size * rate**3) * (known[0] - known[1]) ** 2 * abs(stop - known[0])
    made = first * values[0] + second * values[1]
    assert made == pytest.approx(wanted, abs=1e-9 + slack * math.exp(4 * abs(rate) * 0.3))


@given(st.sets(st.integers(1, 48), min_size=1, max_size=20), st.booleans())
def test_a_filled_plan_has_a_row_a_step(others: set[int], whole_gap: bool) -> None:
    path = [0, *sorted(others)]
    positions = [1 - step / 50 for step in range(51)]
    rows = filled(path, positions, lambda _: extrapolation(1), whole_gap=whole_gap)
    assert len(rows) == 50
    assert all(sum(row) == pytest.approx(1.0) for row in rows)
    if whole_gap:
        ends = [*path, 50]
        assert all(len(set(rows[a:b])) == 1 for a, b in pairwise(ends))
    else:
        assert all(rows[step] == (1.0,) for step in path)
