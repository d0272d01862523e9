"""The candidates that methods offer, and that applying one leaves other pipelines alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies.caching.methods import (
    METHODS,
    MOST_PLANS,
    UnsupportedError,
    interval_settings,
    mask_settings,
    recipe_method,
    schedule_method,
    taylorseer_settings,
    thinned,
)

from hasten.passes.cache.plan import computed_steps
from hasten.recipe import Recipe

BUDGETS = (25, 17, 13, 10)


@pytest.mark.parametrize("computed", BUDGETS)
def test_interval_settings_compute_exactly_that_many_steps(computed: int) -> None:
    settings = interval_settings(computed, "reuse")
    assert len(settings) == MOST_PLANS
    for setting in settings:
        cache = Recipe.from_dict({"cache": setting}).cache
        assert cache is not None
        assert computed_steps(cache, 50) == computed


@pytest.mark.parametrize("computed", BUDGETS)
def test_masks_compute_exactly_that_many_steps(computed: int) -> None:
    masks = [setting["mask"] for setting in mask_settings(computed)]
    assert masks
    assert all(len(mask) == 50 and mask.count("1") == computed for mask in masks)
    assert all(mask[0] == mask[-1] == "1" for mask in masks)


def test_taylorseer_offers_every_order_and_both_places() -> None:
    settings = taylorseer_settings(17)
    assert {(s["cached"], s["max_order"]) for s in settings} == {
        ("output", 0),
        ("output", 1),
        ("output", 2),
        ("blocks", 1),
    }


def test_a_recipe_file_is_a_row_with_one_setting(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[sampling]\nsteps = 28\n[cache]\ninterval = 4\n", "utf-8")
    method = recipe_method(path)
    (setting,) = method.settings(17)
    assert method.name == "recipe:mine.toml"
    assert setting["steps"] == 28
    cache = Recipe.from_toml(setting["toml"]).cache
    assert cache is not None
    assert cache.interval == 4


def test_the_schedules_of_a_folder_are_one_row(tmp_path: Path) -> None:
    for name, steps, compute in (
        ("tiny-50-2", 50, [0, 25]),
        ("tiny-50-2-other", 50, [0, 30]),
        ("tiny-50-3", 50, [0, 9, 30]),
        ("teacher-50-2", 50, [0, 26]),
        ("tiny-28-2", 28, [0, 9]),
    ):
        text = f"[cache]\nkind = 'schedule'\nsteps = {steps}\ncompute = {compute}\n"
        (tmp_path / f"{name}.toml").write_text(text, "utf-8")
    method = schedule_method([tmp_path], "tiny")
    assert method.name == "schedule"
    assert [one["recipe"] for one in method.settings(2)] == [
        "tiny-50-2-other.toml",
        "tiny-50-2.toml",
    ]
    assert [one["recipe"] for one in method.settings(3)] == ["tiny-50-3.toml"]
    assert method.settings(4) == []


def test_the_first_folder_that_has_schedules_is_taken(tmp_path: Path) -> None:
    mine, shipped = tmp_path / "mine", tmp_path / "shipped"
    shipped.mkdir()
    text = "[cache]\nkind = 'schedule'\nsteps = 50\ncompute = [0, 25]\n"
    (shipped / "tiny-50-2.toml").write_text(text, "utf-8")
    assert schedule_method([mine, shipped], "tiny").settings(2)
    with pytest.raises(UnsupportedError, match=r"no generic-for-tiny-50-\*\.toml in"):
        schedule_method([mine, shipped], "generic-for-tiny").settings(2)


@given(st.lists(st.integers(), min_size=1, unique=True), st.integers(2, 20))
def test_thinning_keeps_order_and_both_ends(items: list[int], most: int) -> None:
    kept = thinned(items, most)
    assert len(kept) == min(len(items), most)
    assert (kept[0], kept[-1]) == (items[0], items[-1])
    assert sorted(kept, key=items.index) == kept


def test_every_method_offers_something_at_half_the_steps() -> None:
    assert all(method.settings(25) for method in METHODS.values())
    assert all(
        method.single for method in METHODS.values() if method.knob and not method.knob.static
    )
