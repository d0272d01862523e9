"""The bundled schedules: learned ones, with the fingerprint of their model, and generic ones."""

from __future__ import annotations

import functools
import math
from importlib import resources

from hasten.recipe import Recipe, ScheduleCache

__all__ = ["nearest_schedule", "shipped"]


@functools.cache
def shipped() -> tuple[ScheduleCache, ...]:
    """All bundled schedules, sorted by file name."""
    folder = resources.files("hasten.schedules")
    schedules = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            cache = Recipe.from_toml(entry.read_text("utf-8"), source=entry.name).cache
            assert isinstance(cache, ScheduleCache), entry.name
            schedules.append(cache)
    return tuple(schedules)


def nearest_schedule(fingerprint: str | None, budget: int, steps: int) -> ScheduleCache:
    """Select the schedule for computing `budget` of `steps` steps.

    Args:
        fingerprint: The model's fingerprint; None if unknown.
        budget: The number of steps to compute.
        steps: The number of steps of the run.

    Returns:
        A schedule of the model if there is one, else a generic one (`calibrated` is false). Of
        several, the one with the closest share of computed steps, then number of steps.
    """
    own = [s for s in shipped() if s.fingerprint is not None and s.fingerprint == fingerprint]
    candidates = own or [s for s in shipped() if s.fingerprint is None]

    def distance(schedule: ScheduleCache) -> tuple[float, int]:
        share = len(schedule.compute) / schedule.steps
        return round(abs(math.log(share * steps / budget)), 3), abs(schedule.steps - steps)

    return min(candidates, key=distance)
