"""What a row measures: a loaded model under its recipe."""

from __future__ import annotations

from typing import Any, NamedTuple

from hasten.apply import optimize
from hasten.benchmark.job import Job
from hasten.models import has_random_weights, load_pipeline
from hasten.recipe import Recipe

__all__ = ["Engine", "load"]


class Engine(NamedTuple):
    """`fast` is called like `pipe` and has `last_run` and `notes`; `pipe` is what lies under it."""

    pipe: Any
    fast: Any
    random_weights: bool


def load(job: Job) -> Engine:
    """Load the job's model and apply its recipe."""
    pipe = load_pipeline(job.workload.model, device=job.device, dtype=job.workload.dtype)
    fast = optimize(pipe, Recipe.from_toml(job.toml, source=job.row), force=job.force)
    return Engine(pipe, fast, has_random_weights(pipe))
