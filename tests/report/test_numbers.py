from __future__ import annotations

import pytest

from hasten.report import numbers
from hasten.results import StepsComputed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.00414, "0.0041"),
        (0.0414, "0.0414"),
        (0.858, "0.858"),
        (1.034, "1.03"),
        (12.34, "12.3"),
        (302.4, "302"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert numbers.seconds(value) == text


def test_rounding_never_claims_identity() -> None:
    assert numbers.distance(0.0) == "0.000"
    assert numbers.distance(0.0004) == "0.0004"
    assert numbers.distance(0.00001) == "<0.0001"
    assert numbers.distance(0.25) == "0.250"
    assert numbers.similarity(1.0) == "1.000"
    assert numbers.similarity(0.99951) == ">0.999"
    assert numbers.similarity(0.9994) == "0.999"


def test_memory_is_binary() -> None:
    assert numbers.memory(3 * 2**30 // 2) == "1.5 GiB"
    assert numbers.memory(26 * 2**20) == "26 MiB"


def test_steps_show_a_range_only_where_images_differ() -> None:
    assert numbers.steps(StepsComputed(mean=18, min=18, max=18)) == "18"
    assert numbers.steps(StepsComputed(mean=17.46, min=15, max=20)) == "17.5 (15–20)"


def test_a_change_has_its_sign() -> None:
    assert numbers.percent_change(1.0124) == "+1.2 %"
    assert numbers.percent_change(0.97) == "−3.0 %"
