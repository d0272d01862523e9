"""The search for a setting: pure, against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies.caching.search import gentlest, geometric

costs = st.lists(st.floats(1, 50), min_size=1, max_size=48).map(lambda c: sorted(c, reverse=True))


@given(costs, st.floats(0, 60), st.data())
def test_gentlest_is_the_first_within_the_limit(
    cost: list[float], limit: float, data: st.DataObject
) -> None:
    guess = data.draw(st.none() | st.integers(0, len(cost) - 1))
    expected = next((index for index, value in enumerate(cost) if value <= limit), None)
    assert gentlest(range(len(cost)), limit, cost.__getitem__, guess) == expected


@given(costs, st.floats(0, 60), st.data())
def test_gentlest_asks_few_and_none_twice(
    cost: list[float], limit: float, data: st.DataObject
) -> None:
    guess = data.draw(st.none() | st.integers(0, len(cost) - 1))
    asked: list[int] = []

    def ask(index: int) -> float:
        asked.append(index)
        return cost[index]

    gentlest(range(len(cost)), limit, ask, guess)
    assert len(asked) == len(set(asked))
    assert len(asked) <= 2 * len(cost).bit_length()


def test_a_good_guess_saves_trials() -> None:
    asked: list[int] = []

    def cost(index: int) -> float:
        asked.append(index)
        return float(48 - index)

    assert gentlest(range(48), 11, cost, guess=36) == 37
    assert len(asked) == 2


def test_geometric_has_both_ends_and_equal_ratios() -> None:
    values = geometric(0.01, 10, 4)
    assert values == pytest.approx([0.01, 0.1, 1, 10])
