"""Plans: the article's counts, and what holds for every plan."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.passes.cache.plan import computed_steps, interval_plan, plan_for
from hasten.recipe import Cache


@pytest.mark.parametrize(
    ("interval", "computed"), [(1, 50), (2, 26), (3, 18), (4, 14), (6, 10), (48, 3)]
)
def test_counts_of_fifty_steps(interval: int, computed: int) -> None:
    assert computed_steps(Cache(start_step=2, interval=interval), 50) == computed


def test_which_steps_are_computed() -> None:
    plan = interval_plan(12, start_step=2, interval=3, end_step=9)
    assert [step for step, compute in enumerate(plan) if compute] == [0, 1, 2, 5, 8, 9, 10, 11]


@given(
    steps=st.integers(1, 200),
    start=st.integers(0, 250),
    interval=st.integers(1, 60),
    tail=st.none() | st.integers(0, 60),
)
def test_every_plan(steps: int, start: int, interval: int, tail: int | None) -> None:
    end = None if tail is None else max(1, start + tail)
    plan = plan_for(Cache(start_step=start, interval=interval, end_step=end), steps)
    assert len(plan) == steps
    assert plan[0]
    assert all(plan[:start])
    assert end is None or all(plan[end:])
    gaps = "".join("x" if compute else "." for compute in plan).split("x")
    assert max(map(len, gaps)) <= interval - 1
    if end is None and start < steps:
        assert sum(plan) == start + -(-(steps - start) // interval)
