"""Bytes in words: never "0.0 GiB"."""

from __future__ import annotations

import pytest

from hasten.units import format_bytes


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 KiB"),
        (700, "1 KiB"),
        (12 * 2**10, "12 KiB"),
        (26.4 * 2**20, "26 MiB"),
        (2**30, "1.0 GiB"),
        (31.42 * 2**30, "31.4 GiB"),
    ],
)
def test_the_largest_unit_of_which_there_is_one(size: float, text: str) -> None:
    assert format_bytes(size) == text
