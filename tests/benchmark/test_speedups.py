"""Rounds into rows, rows into speed-ups: recomputed here from the raw samples."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.benchmark.run import pooled
from hasten.results import Row, StepsComputed, summarize_seconds, with_speedups
from tests.benchmark.plans import ENVIRONMENT, make_plan

times = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=8)


def row(name: str, samples: list[float], *, computed: int = 6, memory: int = 10) -> Row:
    return Row(
        recipe=name,
        role="baseline" if name.startswith("baseline") else "recipe",
        status="ok",
        notes=("same",),
        seconds_per_image=summarize_seconds(samples),
        transformer_ms_per_step=samples[0],
        steps_computed=StepsComputed(mean=computed, min=computed, max=computed),
        peak_memory_bytes=memory,
        setup_seconds=samples[-1],
    )


@settings(deadline=None)  # other work on the machine is no failure
@given(rounds=st.lists(times, min_size=1, max_size=4))
def test_all_samples_are_pooled(rounds: list[list[float]]) -> None:
    parts = [row("x", samples, memory=index) for index, samples in enumerate(rounds)]
    one = pooled(parts)
    samples = [value for part in rounds for value in part]
    seconds = one.seconds_per_image
    assert seconds is not None
    assert list(seconds.samples) == samples
    assert seconds.median == pytest.approx(np.median(samples))
    assert seconds.p90 == pytest.approx(np.percentile(samples, 90))
    assert one.peak_memory_bytes == len(rounds) - 1
    assert one.setup_seconds == rounds[0][-1]
    assert one.transformer_ms_per_step == statistics.median(part[0] for part in rounds)
    assert one.notes == ("same",)


def test_a_round_that_fails_fails_the_row() -> None:
    bad = Row(recipe="x", role="recipe", status="failed", reason="no")
    assert pooled([row("x", [1.0]), bad]).reason == "round 2: no"
    assert pooled([bad, row("x", [1.0])]).reason == "no"


def test_speed_ups_are_over_the_mean_of_both_baselines() -> None:
    rows = [row("baseline", [2.0, 4.0]), row("fast", [1.0, 2.0]), row("baseline-again", [3.3])]
    rows.insert(2, Row(recipe="broken", role="recipe", status="failed", reason="no"))
    results = with_speedups(make_plan([], limit=1, rounds=2).workload, ENVIRONMENT, rows)
    assert results.baseline_seconds == pytest.approx(3.15)
    assert [r.speedup for r in results.rows] == [
        pytest.approx(3.15 / 3.0), pytest.approx(2.1), None, pytest.approx(3.15 / 3.3),
    ]  # fmt: skip
    assert results.drift == pytest.approx(1.1)
    assert results.uncertainty == pytest.approx(0.15 / 3.15)
    assert results.rows[-1].notes == ("same",)
    assert json.loads(results.model_dump_json(by_alias=True))["rows"][1]["speedup"] == 2.1


@settings(deadline=None)
@given(first=st.floats(0.01, 100), last=st.floats(0.01, 100), seconds=st.floats(0.01, 100))
def test_the_uncertainty_covers_the_speed_ups_over_either_baseline(
    first: float, last: float, seconds: float
) -> None:
    rows = [row("baseline", [first]), row("x", [seconds]), row("baseline-again", [last])]
    results = with_speedups(make_plan([], limit=1).workload, ENVIRONMENT, rows)
    speedup, uncertainty = results.rows[1].speedup, results.uncertainty
    assert speedup is not None
    assert uncertainty is not None
    for baseline in (first, last):
        assert abs(baseline / seconds - speedup) <= speedup * uncertainty * (1 + 1e-9) + 1e-12


def test_a_graph_has_no_speed_up() -> None:
    graph = row("graph", [1.0]).model_copy(update={"role": "graph"})
    work = make_plan([], limit=1).workload
    results = with_speedups(work, ENVIRONMENT, [row("baseline", [2.0]), graph])
    assert [r.speedup for r in results.rows] == [1.0, None]


def test_without_a_baseline_there_is_no_speed_up() -> None:
    bad = Row(recipe="baseline", role="baseline", status="failed", reason="no")
    rows = [bad, row("fast", [1.0])]
    results = with_speedups(make_plan([], limit=1).workload, ENVIRONMENT, rows)
    assert [r.speedup for r in results.rows] == [None, None]
