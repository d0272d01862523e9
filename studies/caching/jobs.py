"""Splits the comparison into jobs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from studies.caching.methods import METHODS, Method, recipe_method, schedule_method

__all__ = [
    "GENERIC",
    "REFERENCES",
    "SCHEDULE",
    "Job",
    "in_order",
    "jobs_for",
    "limit_of",
    "method_of",
    "name_of",
]

Setting = dict[str, Any]
TOLERANCE = 1.02
REFERENCES = "references"
"""The job that renders the full runs that all other jobs of its model compare with."""
SCHEDULE = "schedule"
GENERIC = "schedule, generic"
"""A plan learned on the other model: what one without a schedule of its own gets."""
STEMS = {SCHEDULE: "{model}", GENERIC: "generic-for-{model}"}


@dataclass(frozen=True)
class Job:
    """The work for a row, or for some of its budgets.

    batch: images at a time where that is fair; None: what suits the device. stored: a setting found
    before for each budget: no search then. blocks: charge a call that leaves early as in a model of
    so many blocks. recipes: folders to find schedules in. notes: for the readers of its rows.
    """

    model: str
    method: str
    budgets: list[float]
    search: int
    last: int
    device: str = "cpu"
    batch: int | None = None
    stored: dict[str, Setting] | None = None
    blocks: int | None = None
    recipes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def limit_of(budget: float) -> float:
    """The largest cost, in evaluations, of a setting for this budget."""
    return budget * TOLERANCE


def method_of(job: Job) -> Method:
    """The method a job names: one of the table, the model's schedules or a recipe file."""
    if job.method in STEMS:
        stem = STEMS[job.method].format(model=job.model)
        return schedule_method([Path(folder) for folder in job.recipes], stem, job.method)
    return METHODS[job.method] if job.method in METHODS else recipe_method(Path(job.method))


def name_of(job: Job) -> str:
    """The name of the job's row."""
    known = job.method in STEMS or job.method in METHODS
    return job.method if known else f"recipe:{Path(job.method).name}"


def _is_long(job: Job) -> bool:
    """Whether it renders one image at a time."""
    return job.method in METHODS and METHODS[job.method].single


def jobs_for(whole: Job) -> list[Job]:
    """A row's jobs: one, or one per budget if the whole row would take long."""
    if not _is_long(whole):
        return [whole]
    return [replace(whole, budgets=[budget]) for budget in whole.budgets]


def in_order(jobs: Iterable[Job]) -> list[Job]:
    """Quick jobs first: together they take little, and are there whatever happens later. Then the
    others, the largest budget first."""
    return sorted(jobs, key=lambda job: (_is_long(job), -job.budgets[0] if _is_long(job) else 0))
