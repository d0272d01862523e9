"""What there is to do, cut into jobs, with a guess at how long each takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from studies.caching.methods import METHODS, Method, recipe_method, schedule_method

__all__ = [
    "GENERIC",
    "REFERENCES",
    "SCHEDULE",
    "Job",
    "empty_row",
    "in_order",
    "job_end",
    "jobs_for",
    "limit_of",
    "method_of",
    "seconds",
]

Setting = dict[str, Any]
STEPS = 50
TOLERANCE = 1.02
REFERENCES = "references"
"""The job that renders the full runs that all other jobs of its model compare with."""
SCHEDULE = "schedule"
GENERIC = "schedule, generic"
"""A plan learned on the other model: what one without a schedule of its own gets."""
STEMS = {SCHEDULE: "{model}", GENERIC: "generic-for-{model}"}
QUICK, LONG = 8.0, 30.0  # seconds: what goes first; what is cut into a job a budget
BRANCHES = {"tiny": 1, "teacher": 2}
COMPUTED, SKIPPED, SETUP = 0.0055, 0.0013, 3.0  # seconds a step, and a job, on an H100 (guesses)
TRIALS = 4  # thresholds tried an option, once the option before has shown where
REFINED = 3  # and of the winner
RETRIED = 1.25  # how often the prompts are measured before a setting keeps within its budget
WIDE = 3  # what a step of all prompts takes, beside a step of few
RESERVE = 20.0  # seconds before the deadline at which nothing more is measured
SLACK = 1.5  # of a job's share of the time, for these are guesses


@dataclass(frozen=True)
class Job:
    """What to do for a row, or for some budgets of it.

    batch: images at a time where that is fair; None: what suits the device. stored: a setting found
    before for each budget: no search then. blocks: charge a call that leaves early as in a model of
    so many blocks. recipes: folders to find schedules in. until: wall clock (seconds since 1970)
    from which on no further prompts are measured.
    """

    model: str
    method: str
    budgets: list[float]
    search: int
    last: int
    device: str = "cpu"
    batch: int | None = None
    stored: dict[str, Setting] | None = None
    timed: bool = False
    blocks: int | None = None
    recipes: list[str] = field(default_factory=list)
    until: float | None = None


def limit_of(budget: float) -> float:
    """The most evaluations a setting may cost and still count for this budget."""
    return budget * TOLERANCE


def method_of(job: Job) -> Method:
    """The method a job names: one of the table, the model's schedules or a recipe file."""
    if job.method in STEMS:
        stem = STEMS[job.method].format(model=job.model)
        return schedule_method([Path(folder) for folder in job.recipes], stem, job.method)
    return METHODS[job.method] if job.method in METHODS else recipe_method(Path(job.method))


def empty_row(job: Job) -> dict[str, Any]:
    """The row of a job before it has any points."""
    row: dict[str, Any] = {"blocks": job.blocks, "points": [], "reason": None, "note": ""}
    if job.method in STEMS:
        return {"method": job.method, "package": "hasten"} | row
    if job.method not in METHODS:
        return {"method": f"recipe:{Path(job.method).name}", "package": "hasten"} | row
    method = METHODS[job.method]
    return {"method": method.name, "package": method.package} | row | {"note": method.note}


def jobs_for(whole: Job) -> list[Job]:
    """A row's jobs: one, or one a budget where the whole takes long and nothing is timed."""
    if whole.timed or seconds(whole) < LONG:
        return [whole]
    return [replace(whole, budgets=[budget]) for budget in whole.budgets]


def in_order(jobs: Iterable[Job], models: Sequence[str]) -> list[Job]:
    """Quick jobs first, the quickest of all: together they take little, and are there whatever
    happens later.
    Then model after model, the longest job first, so that none begins when all others have ended.
    """

    def place(job: Job) -> tuple[int, float]:
        if seconds(job) <= QUICK:
            return 0, seconds(job)
        return 1 + models.index(job.model), -seconds(job)

    return sorted(jobs, key=place)


def seconds(job: Job) -> float:
    """Guess of a job's time on an H100 it has to itself: for order and shares alone."""
    total = SETUP
    for budget in job.budgets:
        step = (COMPUTED * budget + SKIPPED * (STEPS - budget)) * BRANCHES[job.model]
        total += step * _runs(METHODS.get(job.method), budget, job)
    return total


def job_end(
    job: Job, unfinished: Sequence[Job], slots: int, deadline: float | None, now: float
) -> float | None:
    """When this job should stop measuring further prompts, so that all unfinished ones (itself
    among them) get their share of the time on `slots` processes; None without a deadline."""
    if deadline is None:
        return None
    left = deadline - RESERVE - now
    share = seconds(job) * slots / sum(map(seconds, unfinished))
    return now + left * min(1.0, SLACK * share)


def _runs(method: Method | None, budget: float, job: Job) -> float:
    """Runs of 50 steps for one budget; of one image where only that is fair."""
    if method is None:
        return WIDE
    measured = job.last * RETRIED if method.single else WIDE
    if job.stored:
        return measured
    if not method.knob:
        return measured + len(method.settings(int(budget)))
    thresholds = TRIALS * len(method.settings(0)) + REFINED
    return measured + thresholds * (job.search if method.single else 1)
