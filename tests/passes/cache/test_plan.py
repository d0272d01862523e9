"""Plans: the article's counts, and what holds for every plan on every grid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.passes.cache.plan import (
    Planner,
    computed_steps,
    interval_plan,
    resampled,
    schedule_plan,
    why_none_skipped,
)
from hasten.recipe import BudgetCache, IntervalCache, ResidualCache, ScheduleCache
from hasten.schedules import nearest_schedule, shipped


def grid(steps: int, shift: float = 1.0) -> list[float]:
    """FLUX's noise levels of `steps` steps under a timestep shift, and the end."""
    even = [1 - step / steps for step in range(steps)]
    return [*(shift * s / (1 + (shift - 1) * s) for s in even), 0.0]


@pytest.mark.parametrize(
    ("interval", "computed"), [(1, 50), (2, 26), (3, 18), (4, 14), (6, 10), (48, 3)]
)
def test_counts_of_fifty_steps(interval: int, computed: int) -> None:
    assert computed_steps(IntervalCache(start_step=2, interval=interval), 50) == computed


def test_which_steps_are_computed() -> None:
    plan = interval_plan(IntervalCache(start_step=2, interval=3, end_step=9), grid(12))
    assert [step for step, compute in enumerate(plan.compute) if compute] == [
        0, 1, 2, 5, 8, 9, 10, 11,
    ]  # fmt: skip


@given(
    steps=st.integers(1, 200),
    start=st.integers(0, 250),
    interval=st.integers(1, 60),
    tail=st.none() | st.integers(0, 60),
    predictor=st.sampled_from(["reuse", "linear"]),
)
def test_every_interval_plan(
    steps: int, start: int, interval: int, tail: int | None, predictor: str
) -> None:
    end = None if tail is None else max(1, start + tail)
    cache = IntervalCache(start_step=start, interval=interval, end_step=end, predictor=predictor)
    plan = interval_plan(cache, grid(steps))
    assert len(plan.compute) == len(plan.weights) == steps
    assert plan.compute[0]
    assert all(plan.compute[:start])
    assert end is None or all(plan.compute[end:])
    gaps = "".join("x" if compute else "." for compute in plan.compute).split("x")
    assert max(map(len, gaps)) <= interval - 1
    assert sum(plan.compute) == computed_steps(cache, steps)
    for compute, weights in zip(plan.compute, plan.weights, strict=True):
        assert sum(weights) == pytest.approx(1)
        assert not compute or weights == (1.0,)


schedules = st.integers(2, 60).flatmap(
    lambda steps: st.builds(
        lambda picked, shift: ScheduleCache(
            steps=steps,
            compute=tuple(sorted({0, *picked})),
            sigmas=tuple(grid(steps, shift)[:-1]),
        ),
        picked=st.sets(st.integers(0, steps - 1)),
        shift=st.floats(0.5, 6),
    )
)


@given(schedule=schedules)
def test_a_schedule_on_its_own_grid_is_itself(schedule: ScheduleCache) -> None:
    assert schedule.sigmas is not None
    plan = schedule_plan(schedule, [*schedule.sigmas, 0.0])
    assert tuple(i for i, compute in enumerate(plan.compute) if compute) == schedule.compute
    again = resampled(schedule.compute, schedule.sigmas, [*schedule.sigmas, 0.0])
    assert len(again) == len(schedule.compute)


@given(
    schedule=schedules,
    steps=st.integers(1, 100),
    shift=st.floats(0.5, 6),
    late=st.floats(0, 0.9),
    count=st.none() | st.integers(1, 100),
)
def test_a_schedule_resamples_to_a_plan_on_every_grid(
    schedule: ScheduleCache, steps: int, shift: float, late: float, count: int | None
) -> None:
    levels = grid(steps, shift)[int(late * steps) :]
    plan = schedule_plan(schedule, levels, budget=count)
    remaining = len(levels) - 1
    assert len(plan.compute) == len(plan.weights) == remaining
    assert plan.compute[0]
    if count is not None:
        assert sum(plan.compute) == min(count, remaining)
    if len(schedule.compute) == schedule.steps and count is None:
        assert all(plan.compute), "a schedule that computes everything does so everywhere"


def test_fitted_weights_hold_from_their_step_to_the_next_computed_one() -> None:
    schedule = ScheduleCache(steps=4, compute=(0, 2), weights=((1.0,), (1.5, -0.5)))
    plan = schedule_plan(schedule, grid(4))
    assert plan.weights == ((1.0,), (1.0,), (1.5, -0.5), (1.5, -0.5))
    assert plan.history == 2


@given(budget=st.integers(1, 60), steps=st.integers(1, 60))
def test_a_budget_is_kept_on_every_grid(budget: int, steps: int) -> None:
    planner = Planner(BudgetCache(budget=budget), fingerprint=None)
    assert sum(planner(grid(steps)).compute) == min(budget, steps)
    assert planner.calibrated is False


def test_shipped_schedules_are_found_by_their_model() -> None:
    assert any(schedule.fingerprint is None for schedule in shipped())
    for schedule in shipped():
        if schedule.fingerprint is not None:
            budget = len(schedule.compute)
            assert nearest_schedule(schedule.fingerprint, budget, schedule.steps) is schedule
        else:
            assert not schedule.calibrated


def test_why_no_step_is_skipped() -> None:
    budget = BudgetCache(budget=60)
    assert why_none_skipped(budget, 50) == "no step is skipped: budget = 60 computes all 50 steps"
    assert why_none_skipped(budget, 61) is None
    assert why_none_skipped(None, 50) is None
    assert why_none_skipped(ResidualCache(), 50) is None
    all_steps = IntervalCache(start_step=10)
    assert "the plan of [cache]" in str(why_none_skipped(all_steps, 10))
