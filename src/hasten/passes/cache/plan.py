"""Who computes when: a plan says for each sampling step whether the transformer runs. No torch."""

from __future__ import annotations

from hasten.recipe import Cache

__all__ = ["computed_steps", "interval_plan", "plan_for"]

Plan = tuple[bool, ...]


def interval_plan(steps: int, *, start_step: int, interval: int, end_step: int | None) -> Plan:
    """Compute steps < start_step, then every interval-th, then all from end_step on.

    Step 0 is always computed (there is nothing to stand in). With N steps, start s and interval k
    (no end) s + ceil((N − s)/k) are computed: 18 of 50 for s = 2, k = 3.
    """
    last = steps if end_step is None else end_step
    return tuple(
        step < start_step or step >= last or (step - start_step) % interval == 0
        for step in range(steps)
    )


def plan_for(cache: Cache, steps: int) -> Plan:
    """The plan of a recipe's `[cache]` section for a run of `steps` steps."""
    return interval_plan(
        steps, start_step=cache.start_step, interval=cache.interval, end_step=cache.end_step
    )


def computed_steps(cache: Cache, steps: int) -> int:
    """How many of `steps` steps the plan computes."""
    return sum(plan_for(cache, steps))
