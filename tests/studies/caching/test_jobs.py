"""How work is cut into jobs and ordered."""

from __future__ import annotations

from dataclasses import replace

import pytest
from studies.caching.jobs import SCHEDULE, Job, in_order, jobs_for, method_of, name_of
from studies.caching.methods import METHODS, UnsupportedError

EULER = Job("tiny", "fewer steps, Euler", [25, 17, 13, 10], search=4, last=100)
ADAPTIVE = replace(EULER, method="DBCache")


def test_a_long_row_is_a_job_for_each_budget_and_a_quick_one_stays_whole() -> None:
    assert jobs_for(EULER) == [EULER]
    assert [part.budgets for part in jobs_for(ADAPTIVE)] == [[25], [17], [13], [10]]


def test_quick_jobs_come_first_then_the_largest_budgets() -> None:
    rows = [replace(EULER, model=model, method=name) for model in ("teacher", "tiny")
            for name in METHODS]  # fmt: skip
    order = in_order(job for row in rows for job in jobs_for(row))
    single = [METHODS[job.method].single for job in order]
    assert single == sorted(single)
    long = [job.budgets[0] for job in order if METHODS[job.method].single]
    assert long == sorted(long, reverse=True)


def test_a_recipe_file_is_a_row_of_its_name() -> None:
    assert name_of(replace(EULER, method="/some/where/mine.toml")) == "recipe:mine.toml"
    assert name_of(ADAPTIVE) == "DBCache"


def test_a_model_without_schedules_says_so() -> None:
    job = replace(EULER, model="teacher", method=SCHEDULE, recipes=["/nowhere"])
    with pytest.raises(UnsupportedError, match=r"no teacher-50-\*.toml in /nowhere"):
        method_of(job).settings(17)
    assert name_of(job) == "schedule"
