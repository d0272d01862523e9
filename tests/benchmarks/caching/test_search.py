"""The search for a setting: pure, against brute force."""

from __future__ import annotations

import pytest
from benchmarks.caching.search import gentlest, geometric, halve
from hypothesis import given
from hypothesis import strategies as st

costs = st.lists(st.floats(1, 50), min_size=1, max_size=40).map(lambda c: sorted(c, reverse=True))


@given(costs, st.floats(0, 60))
def test_gentlest_is_the_first_within_the_limit(cost: list[float], limit: float) -> None:
    expected = next((index for index, value in enumerate(cost) if value <= limit), None)
    found = gentlest(range(len(cost)), limit, cost.__getitem__)
    assert found is None if expected is None else cost[found] == cost[expected]


@given(costs)
def test_gentlest_asks_few(cost: list[float]) -> None:
    asked: list[int] = []

    def ask(index: int) -> float:
        asked.append(index)
        return cost[index]

    gentlest(range(len(cost)), 20, ask)
    assert len(asked) <= len(cost).bit_length() + 1


def test_geometric_has_both_ends_and_equal_ratios() -> None:
    values = geometric(0.01, 10, 4)
    assert values == pytest.approx([0.01, 0.1, 1, 10])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30, unique=True))
def test_halving_with_a_faithful_judge_finds_the_best(errors: list[float]) -> None:
    found = halve(range(len(errors)), lambda index, _: errors[index], ((2, 4), (8, 1)))
    assert errors[found] == min(errors)


def test_halving_asks_the_last_stage_about_the_survivors_only() -> None:
    asked: list[tuple[int, int]] = []

    def error(candidate: int, prompts: int) -> float:
        asked.append((prompts, candidate))
        return float(candidate)

    assert halve(range(10), error, ((2, 3), (8, 1))) == 0
    assert [one for one in asked if one[0] == 8] == [(8, 0), (8, 1), (8, 2)]


def test_a_lone_candidate_costs_nothing() -> None:
    assert halve(["only"], lambda *_: pytest.fail("judged"), ((2, 4), (8, 1))) == "only"
