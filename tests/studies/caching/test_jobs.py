"""How work is cut into jobs, ordered, and given its share of the time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from studies.caching.jobs import (
    QUICK,
    RESERVE,
    SCHEDULE,
    SLACK,
    Job,
    empty_row,
    in_order,
    job_end,
    jobs_for,
    method_of,
    seconds,
)
from studies.caching.methods import METHODS, UnsupportedError

EULER = Job("tiny", "fewer steps, Euler", [25, 17, 13, 10], search=4, last=100)
ADAPTIVE = replace(EULER, method="DBCache")


def test_a_long_row_is_a_job_a_budget_and_a_quick_one_stays_whole() -> None:
    assert jobs_for(EULER) == [EULER]
    parts = jobs_for(ADAPTIVE)
    assert [part.budgets for part in parts] == [[25], [17], [13], [10]]


def test_a_timed_row_stays_whole() -> None:
    timed = replace(ADAPTIVE, timed=True, stored={"25": {}})
    assert jobs_for(timed) == [timed]


def test_quick_jobs_come_first_then_each_models_longest() -> None:
    rows = [replace(EULER, model=model, method=name) for model in ("teacher", "tiny")
            for name in METHODS]  # fmt: skip
    order = in_order((job for row in rows for job in jobs_for(row)), ["tiny", "teacher"])
    quick = [job for job in order if seconds(job) <= QUICK]
    assert order[: len(quick)] == quick
    long = order[len(quick) :]
    assert [job.model for job in long] == sorted((job.model for job in long), reverse=True)
    times = [seconds(job) for job in long if job.model == "teacher"]
    assert times == sorted(times, reverse=True)


def test_a_job_gets_its_share_of_the_time_left() -> None:
    now, deadline = 1000.0, 1000.0 + RESERVE + 100.0
    others = [ADAPTIVE] * 30
    share = 100 * SLACK * 2 / 30
    assert job_end(ADAPTIVE, others, 2, deadline, now) == pytest.approx(now + share)
    assert job_end(ADAPTIVE, [ADAPTIVE], 2, deadline, now) == pytest.approx(now + 100)
    assert job_end(ADAPTIVE, others, 2, None, now) is None


def test_known_settings_cost_no_search() -> None:
    assert seconds(replace(ADAPTIVE, stored={"25": {}})) < seconds(ADAPTIVE)


def test_a_model_without_schedules_says_so() -> None:
    job = replace(EULER, model="teacher", method=SCHEDULE, recipes=["/nowhere"])
    with pytest.raises(UnsupportedError, match=r"no teacher-50-\*.toml in /nowhere"):
        method_of(job).settings(17)
    assert empty_row(job)["method"] == "schedule"
    assert seconds(job) > 0
