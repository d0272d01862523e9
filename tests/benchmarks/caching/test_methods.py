"""The candidates that methods offer, and that applying one leaves other pipelines alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.caching.methods import (
    METHODS,
    interval_settings,
    mask_settings,
    recipe_method,
    taylorseer_settings,
)

from hasten.passes.cache.plan import computed_steps
from hasten.recipe import Recipe

BUDGETS = (25, 17, 13, 10)


@pytest.mark.parametrize("computed", BUDGETS)
def test_interval_settings_compute_exactly_that_many_steps(computed: int) -> None:
    settings = interval_settings(computed, "reuse")
    assert len(settings) > 10
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


def test_every_method_offers_something_at_half_the_steps() -> None:
    assert all(method.settings(25) for method in METHODS.values())
    assert all(
        method.single for method in METHODS.values() if method.knob and not method.knob.static
    )
