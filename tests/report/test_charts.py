from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.report import charts
from hasten.results import Results


@given(st.floats(1e-4, 1e4), st.integers(3, 8))
def test_ticks_are_round_evenly_spaced_and_within(largest: float, wanted: int) -> None:
    ticks = charts.nice_ticks(largest, wanted)
    assert ticks[0] == 0
    assert ticks[-1] <= largest * (1 + 1e-6)
    assert 2 <= len(ticks) <= wanted + 1
    step = ticks[1]
    assert f"{step:.0e}"[0] in "125"
    assert all(b - a == pytest.approx(step) for a, b in itertools.pairwise(ticks))


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
def test_bars_are_in_proportion(results: Results, width: int) -> None:
    chart = charts.bars(results, width)
    speeds = [row.speedup for row in results.rows if row.speedup]
    assert [bar.width for bar in chart.bars] == pytest.approx(
        [speed / max(speeds) * width for speed in speeds]
    )
    assert chart.one == pytest.approx(width / max(speeds))


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
def test_points_lie_where_their_numbers_say(results: Results, width: int) -> None:
    chart = charts.scatter(results, width, 380)
    across = {tick.text: tick.position for tick in chart.x_ticks}
    up = {tick.text: tick.position for tick in chart.y_ticks}
    point = next(point for point in chart.points if point.recipe == "max")
    x, y = map(float, re.findall(r"-?[\d.]+", point.mark)[:2])
    lpips = (x + 5.5 - across["0"]) / (across["0.1"] - across["0"]) * 0.1
    speed = (y - up["0×"]) / (up["2×"] - up["0×"]) * 2
    assert lpips == pytest.approx(0.148, abs=1e-3)
    assert speed == pytest.approx(4.03 / 0.61, rel=2e-3)


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
def test_labels_stay_inside_and_apart(results: Results, width: int) -> None:
    chart = charts.scatter(results, width, 380)
    boxes = []
    for point in chart.points:
        length, label = charts.CHARACTER * len(point.recipe), point.label
        left = label.x - {"start": 0, "middle": length / 2, "end": length}[label.anchor]
        assert left >= 0
        assert left + length <= width
        boxes.append((left, label.y - 10, left + length, label.y + 3))
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_staircase_passes_through_unbeaten_points_only(results: Results) -> None:
    chart = charts.scatter(results, charts.WIDE, 380)
    corners = len(re.findall("V", chart.frontier)) + 1
    # baseline, compile, cache, cache-compile, max; not the peer nor fewer steps, which are beaten
    assert corners == 5
