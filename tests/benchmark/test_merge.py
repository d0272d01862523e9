"""Rounds into rows, rows into results: recomputed here from the raw samples."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.benchmark.merge import assemble, pooled
from hasten.results import Row, StepsComputed, summarize_seconds
from tests.benchmark.plans import ENVIRONMENT, make_plan

times = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=8)


def row(name: str, samples: list[float], *, computed: int = 6, memory: int = 10) -> Row:
    return Row(
        recipe=name,
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
    bad = Row(recipe="x", status="failed", reason="no")
    assert pooled([row("x", [1.0]), bad]).reason == "round 2: no"
    assert pooled([bad, row("x", [1.0])]).reason == "no"


def test_speed_ups_and_drift_follow_the_first_baseline() -> None:
    plan = make_plan([])
    names = ["baseline", "fast", "broken", "baseline-again"]
    rows = [row("baseline", [2.0, 4.0]), row("fast", [1.0, 2.0]), row("baseline-again", [3.3])]
    rows.insert(2, Row(recipe="broken", status="failed", reason="no"))
    results = assemble(plan.workload, ENVIRONMENT, [[r] for r in rows])
    assert [r.recipe for r in results.rows] == names
    assert [r.speedup for r in results.rows] == [1.0, 2.0, None, pytest.approx(3.0 / 3.3)]
    assert results.drift == pytest.approx(1.1)
    assert results.rows[-1].notes == ("same",)
    assert json.loads(results.model_dump_json(by_alias=True))["rows"][1]["speedup"] == 2.0


def test_a_row_for_its_quality_only_has_no_speed_up() -> None:
    graph = row("graph", [1.0]).model_copy(update={"quality_only": True})
    results = assemble(make_plan([]).workload, ENVIRONMENT, [[row("baseline", [2.0])], [graph]])
    assert [r.speedup for r in results.rows] == [1.0, None]
    assert results.rows[1].quality_only


def test_without_a_baseline_there_is_no_speed_up() -> None:
    bad = Row(recipe="baseline", status="failed", reason="no")
    rows = [bad, row("fast", [1.0])]
    results = assemble(make_plan([]).workload, ENVIRONMENT, [[r] for r in rows])
    assert [r.speedup for r in results.rows] == [None, None]
