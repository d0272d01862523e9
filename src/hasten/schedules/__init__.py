"""Schedules that ship: learned ones, which name their model by fingerprint, and generic ones."""

from __future__ import annotations

import functools
import math
from importlib import resources

from hasten.recipe import Recipe, ScheduleCache

__all__ = ["nearest_schedule", "shipped"]


@functools.cache
def shipped() -> tuple[ScheduleCache, ...]:
    """All of them, in file order."""
    folder = resources.files("hasten.schedules")
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            cache = Recipe.from_toml(entry.read_text("utf-8"), source=entry.name).cache
            assert isinstance(cache, ScheduleCache), entry.name
            found.append(cache)
    return tuple(found)


def nearest_schedule(fingerprint: str | None, budget: int, steps: int) -> ScheduleCache:
    """The schedule for computing `budget` of `steps` steps: the model's own if it has any, else a
    generic one (`calibrated` is false); of several, the nearest in share and then in steps."""
    own = [s for s in shipped() if s.fingerprint is not None and s.fingerprint == fingerprint]
    candidates = own or [s for s in shipped() if s.fingerprint is None]

    def distance(schedule: ScheduleCache) -> tuple[float, int]:
        share = len(schedule.compute) / schedule.steps
        return round(abs(math.log(share * steps / budget)), 3), abs(schedule.steps - steps)

    return min(candidates, key=distance)
