"""Step plans: which steps a run computes and how the others are filled. Does not import torch.

A plan depends only on the run's noise levels and is made before the run starts. So nothing is read
back from the device, compiled code contains no decision, and the cost is known in advance.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.passes.cache.predict import WEIGHTS, Weights
from hasten.recipe import (
    BudgetCache,
    Cache,
    IntervalCache,
    PlannedCache,
    ResidualCache,
    ScheduleCache,
)
from hasten.schedules import nearest_schedule

SAME_SIGMA = 2e-3  # noise levels this close count as the same grid


@dataclass(frozen=True)
class StepPlan:
    """For each step of a run: whether the transformer runs, and how past outputs are combined.

    Attributes:
        compute: Whether each step is computed.
        weights: For each step, the factors of the computed outputs, newest first; the sum of the
            products is the velocity. On a computed step, its own output is the newest. (1.0,)
            selects the newest output itself.
    """

    compute: tuple[bool, ...]
    weights: tuple[Weights, ...]

    @property
    def history(self) -> int:
        """The number of computed outputs to keep."""
        return max(len(row) for row in self.weights)


def interval_steps(
    steps: int, *, start_step: int, interval: int, end_step: int | None
) -> list[int]:
    """The computed steps: all below start_step, then every interval-th, then all from end_step on.

    Step 0 is always computed because there is no output to reuse. With N steps, start s, interval k
    and no end, s + ceil((N − s)/k) steps are computed: 18 of 50 for s = 2, k = 3.
    """
    last = steps if end_step is None else end_step
    return [
        step
        for step in range(steps)
        if step < start_step or step >= last or (step - start_step) % interval == 0
    ]


def predicted(sigmas: Sequence[float], computed: Sequence[int], predictor: str) -> StepPlan:
    """Make a plan over N steps whose skipped steps are filled by a predictor.

    Args:
        sigmas: The run's N noise levels and its end, N + 1 falling values.
        computed: The steps to compute.
        predictor: "reuse", "linear" or "damped".
    """
    weigh = WEIGHTS[predictor]
    steps = len(sigmas) - 1
    chosen = set(computed)
    weights: list[Weights] = []
    known: list[float] = []  # noise levels of computed steps, newest first
    for step in range(steps):
        if step in chosen:
            known.insert(0, sigmas[step])
        weights.append(weigh(known, sigmas[step]))
    return StepPlan(tuple(step in chosen for step in range(steps)), tuple(weights))


def interval_plan(cache: IntervalCache, sigmas: Sequence[float]) -> StepPlan:
    """The plan of kind `interval` for a run over `sigmas` (N noise levels and the end)."""
    computed = interval_steps(
        len(sigmas) - 1,
        start_step=cache.start_step,
        interval=cache.interval,
        end_step=cache.end_step,
    )
    return predicted(sigmas, computed, cache.predictor)


def schedule_plan(
    schedule: ScheduleCache, sigmas: Sequence[float], *, budget: int | None = None
) -> StepPlan:
    """Apply a learned schedule to the noise levels of a run.

    On the grid that it was learned on, the schedule is used unchanged. On another grid (number of
    steps, shift, resolution, a late start), the density of its computed steps over sigma is kept.
    The predictor `damped` then replaces the fitted weights, which are valid only for the learned
    gaps.

    Args:
        schedule: The schedule.
        sigmas: The run's N noise levels and its end, N + 1 falling values.
        budget: The number of steps to compute on another grid; by default, the same share of the
            steps as in the schedule.
    """
    steps = len(sigmas) - 1
    same_count = budget is None or budget == len(schedule.compute)
    if steps == schedule.steps and same_count and _same_grid(schedule, sigmas):
        if schedule.weights is None:
            return predicted(sigmas, schedule.compute, schedule.predictor)
        chosen = set(schedule.compute)
        gaps = iter(schedule.weights)
        rows: list[Weights] = []
        for step in range(steps):
            rows.append(next(gaps) if step in chosen else rows[-1])
        return StepPlan(tuple(step in chosen for step in range(steps)), tuple(rows))
    learned = schedule.sigmas or tuple(1 - i / schedule.steps for i in range(schedule.steps))
    computed = resampled(schedule.compute, learned, sigmas, count=budget)
    return predicted(sigmas, computed, "damped" if schedule.weights else schedule.predictor)


@dataclass(frozen=True)
class Planner:
    """Plans runs of one model under one `[cache]` section."""

    cache: PlannedCache
    fingerprint: str | None

    def __call__(self, sigmas: Sequence[float]) -> StepPlan:
        """The plan of a run over N falling noise levels and its end (N + 1 values)."""
        if isinstance(self.cache, IntervalCache):
            return interval_plan(self.cache, sigmas)
        if isinstance(self.cache, ScheduleCache):
            return schedule_plan(self.cache, sigmas)
        steps = len(sigmas) - 1
        budget = min(self.cache.budget, steps)
        return schedule_plan(
            nearest_schedule(self.fingerprint, budget, steps), sigmas, budget=budget
        )

    @property
    def calibrated(self) -> bool | None:
        """Whether the plan was learned on this model; None for kinds that are not learned."""
        if isinstance(self.cache, ScheduleCache):
            own = self.fingerprint is not None and self.cache.fingerprint == self.fingerprint
            return self.cache.calibrated and own
        if isinstance(self.cache, BudgetCache):
            return nearest_schedule(self.fingerprint, self.cache.budget, 50).fingerprint is not None
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
        if isinstance(cache, BudgetCache):
            return f"computes {cache.budget} steps by a schedule"
        filled = "fitted weights" if cache.weights else cache.predictor
        return (
            f"computes {len(cache.compute)} of {cache.steps} steps by a schedule; "
            f"{filled} of the velocity on the others"
        )


def computed_steps(cache: Cache, steps: int) -> int | None:
    """How many of `steps` steps a full run computes; None if that is decided during the run."""
    if isinstance(cache, ResidualCache):
        return None
    if isinstance(cache, IntervalCache):
        return len(
            interval_steps(
                steps,
                start_step=cache.start_step,
                interval=cache.interval,
                end_step=cache.end_step,
            )
        )
    if isinstance(cache, BudgetCache):
        return min(cache.budget, steps)
    if cache.steps == steps:
        return len(cache.compute)
    return max(1, min(steps, round(len(cache.compute) * steps / cache.steps)))


def why_none_skipped(cache: Cache | None, steps: int) -> str | None:
    """Why a run of `steps` steps skips none of them; None where it skips some, or may do so."""
    if cache is None or computed_steps(cache, steps) != steps:
        return None
    plan = f"budget = {cache.budget}" if isinstance(cache, BudgetCache) else "the plan of [cache]"
    return f"no step is skipped: {plan} computes all {steps} steps"


def _same_grid(schedule: ScheduleCache, sigmas: Sequence[float]) -> bool:
    return schedule.sigmas is None or all(
        abs(learned - sigma) < SAME_SIGMA
        for learned, sigma in zip(schedule.sigmas, sigmas, strict=False)
    )


def resampled(
    compute: Sequence[int],
    learned: Sequence[float],
    sigmas: Sequence[float],
    *,
    count: int | None = None,
) -> list[int]:
    """Transfer the computed steps of one grid of noise levels to another.

    The learned steps define a cumulative count over sigma, linear between them. The new steps are
    those at which this count, scaled to `count` steps, passes whole numbers.

    Args:
        compute: Computed steps as indices into `learned`.
        learned: The original grid: N falling noise levels.
        sigmas: The new grid: N' falling noise levels and the end.
        count: The number of steps to compute; by default, the same share as on the original grid.

    Returns:
        Distinct, rising steps that begin with 0.
    """
    steps = len(sigmas) - 1
    first = sigmas[0]
    nodes = [learned[step] for step in compute]
    total = _position(nodes, 0.0) - _position(nodes, first)
    if count is None:
        covered = len(learned) - _position(learned, first)
        count = round(total * steps / covered)
    count = max(1, min(steps, count))
    start = _position(nodes, first)
    passed = [(_position(nodes, sigma) - start) * count / total for sigma in sigmas[:-1]]
    chosen: list[int] = []
    for number in range(count):
        nearest = min(bisect_left(passed, number - 0.5), steps - 1)
        latest = steps - (count - number)  # leaves enough steps for the remaining ones
        earliest = chosen[-1] + 1 if chosen else 0
        closest = min(
            range(nearest, min(nearest + 2, steps)), key=lambda step: abs(passed[step] - number)
        )
        chosen.append(min(max(closest, earliest), latest) if number else 0)
    return chosen


def _position(levels: Sequence[float], sigma: float) -> float:
    """Interpolated index of `sigma` in falling `levels` continued to 0; 0 above the first."""
    if sigma >= levels[0]:
        return 0.0
    extended = [*levels, 0.0] if levels[-1] > 0 else list(levels)
    for index, (high, low) in enumerate(itertools.pairwise(extended)):
        if sigma >= low:
            return index + (high - sigma) / (high - low)
    return float(len(extended) - 1)
