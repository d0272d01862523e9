from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.report import table
from hasten.results import StepsComputed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00414, "0.0041"),
        (0.0414, "0.0414"),
        (0.858, "0.858"),
        (1.034, "1.03"),
        (12.34, "12.3"),
        (302.4, "302"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert table.format_seconds(value) == text


def test_rounding_never_claims_identity() -> None:
    assert table.format_distance(0.0) == "0.000"
    assert table.format_distance(0.0004) == "0.0004"
    assert table.format_distance(0.00001) == "<0.0001"
    assert table.format_distance(0.25) == "0.250"
    assert table.format_similarity(1.0) == "1.000"
    assert table.format_similarity(0.99951) == ">0.999"
    assert table.format_similarity(0.9994) == "0.999"


def test_memory_is_binary() -> None:
    assert table.format_memory(3 * 2**30 // 2) == "1.5 GiB"
    assert table.format_memory(26 * 2**20) == "26 MiB"


def test_steps_show_a_range_only_where_images_differ() -> None:
    assert table.format_steps(StepsComputed(mean=18, min=18, max=18)) == "18"
    assert table.format_steps(StepsComputed(mean=17.46, min=15, max=20)) == "17.5 (15–20)"


def test_a_change_has_its_sign() -> None:
    assert table.format_change(1.0124) == "+1.2 %"
    assert table.format_change(0.97) == "−3.0 %"


@pytest.mark.parametrize(
    ("value", "uncertainty", "text"),
    [
        (2.2692, 0.0949, "2.3×"),
        (2.7205, 0.0025, "2.72×"),
        (1.0, 0.0, "1.00×"),
        (5.045, 0.645, "5×"),
        (25.8, 0.1088, "26×"),
        (1.1, None, "1.1×"),
    ],
)
def test_a_speed_up_is_no_finer_than_the_drift(
    value: float, uncertainty: float | None, text: str
) -> None:
    assert table.format_speedup(value, uncertainty) == text


@given(st.floats(1e-3, 1e3), st.floats(0, 0.999))
def test_the_last_digit_of_a_speed_up_is_the_first_uncertain_one(
    value: float, uncertainty: float
) -> None:
    text = table.format_speedup(value, uncertainty).removesuffix("×")
    unit = 10.0 ** -len(text.partition(".")[2])
    assert unit >= 0.01
    if 0.01 < value * uncertainty < 10:
        assert unit * 0.999 <= value * uncertainty < unit * 10.001
