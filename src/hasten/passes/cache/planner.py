"""From the recipe's `[cache]` section to the function that plans a run, and what to say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.passes.cache.plan import Plan, interval_plan, schedule_plan
from hasten.recipe import BudgetCache, IntervalCache, PlannedCache, ScheduleCache
from hasten.schedules import nearest

__all__ = ["Planner"]


@dataclass(frozen=True)
class Planner:
    """Plans runs of one model under one `[cache]` section."""

    cache: PlannedCache
    fingerprint: str | None

    def __call__(self, sigmas: Sequence[float]) -> Plan:
        """The plan of a run over N falling noise levels and its end (N + 1 entries)."""
        if isinstance(self.cache, IntervalCache):
            return interval_plan(self.cache, sigmas)
        if isinstance(self.cache, ScheduleCache):
            return schedule_plan(self.cache, sigmas)
        steps = len(sigmas) - 1
        budget = min(self.cache.budget, steps)
        return schedule_plan(nearest(self.fingerprint, budget, steps), sigmas, budget=budget)

    @property
    def calibrated(self) -> bool | None:
        """Whether the plan was learned on this very model; None for kinds that are not learned."""
        if isinstance(self.cache, ScheduleCache):
            own = self.fingerprint is not None and self.cache.fingerprint == self.fingerprint
            return self.cache.calibrated and own
        if isinstance(self.cache, BudgetCache):
            return nearest(self.fingerprint, self.cache.budget, 50).fingerprint is not None
        return None

    def describe(self) -> str:
        """One line for the summary."""
        cache = self.cache
        if isinstance(cache, IntervalCache):
            until = "" if cache.end_step is None else f", all from step {cache.end_step} on"
            return (
                f"computes steps below {cache.start_step}, then one of every {cache.interval}"
                f"{until}; {cache.predictor} of the velocity on the others"
            )
        calibrated = "learned on this model" if self.calibrated else "calibrated: false"
        if isinstance(cache, BudgetCache):
            return f"computes {cache.budget} steps by a schedule ({calibrated})"
        filled = "fitted weights" if cache.weights else cache.predictor
        return (
            f"computes {len(cache.compute)} of {cache.steps} steps by a schedule ({calibrated}); "
            f"{filled} of the velocity on the others"
        )
