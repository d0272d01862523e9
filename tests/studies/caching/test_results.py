"""Scores as the product's results, put together from what jobs return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies.caching.results import (
    Score,
    failed_row,
    folder_of,
    package_of,
    put,
    scored_row,
    setting_of,
    workload_of,
)
from studies.caching.workload import Prompt

from hasten.recipe import Recipe
from hasten.report import table
from hasten.results import Environment, Results, Row
from hasten.results_file import read_results

PROMPTS = [Prompt(98, "a fox"), Prompt(99, "a tea pot")]
WORKLOAD = workload_of("tiny", PROMPTS, "the last 2")
ENVIRONMENT = Environment(
    device="cpu", torch="2", diffusers="0", hasten="0", date="2026-11-27"
)  # fmt: skip
INTERVAL = {"kind": "interval", "start_step": 2, "interval": 3, "end_step": 50}


def scored(name: str, setting: dict[str, Any], lpips: float, **more: Any) -> Row:
    score = Score([lpips, lpips], [0.9, 0.9], [30.0, 40.0], [17.0, 17.5], [16.0, 17.0])
    return scored_row(name, setting, score, PROMPTS, **more)


def filled(folder: Path, *rows: Row) -> Results:
    put(folder, WORKLOAD, ENVIRONMENT, rows)
    return read_results(folder / "results.json")


def test_a_score_becomes_a_row_with_every_prompt() -> None:
    row = scored("MagCache", {"threshold": 0.1, "ratios": [1.0]}, 0.02, tried=3, notes=["here"])
    (quality,) = row.quality
    assert row.role == "peer"
    assert [entry.id for entry in quality.per_prompt] == [98, 99]
    assert (quality.lpips, quality.psnr) == (0.02, 35.0)
    assert row.extra == {"evaluations": 17.25, "settings tried": 3}
    assert row.steps_computed is not None
    assert (row.steps_computed.min, row.steps_computed.max) == (16, 17)
    assert row.notes == ("threshold 0.1", "here")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("interval, linear", {**INTERVAL, "predictor": "linear"}),
        ("MagCache", {"threshold": 0.1, "mag_ratios": [1.0, 0.5]}),
        ("fewer steps, Euler", {"steps": 17}),
    ],
)
def test_a_setting_can_be_read_from_its_row(name: str, setting: dict[str, Any]) -> None:
    found = setting_of(scored(name, setting, 0.1))
    assert found is not None
    assert {key: found[key] for key in setting} == setting


def test_a_recipes_setting_is_its_toml() -> None:
    toml = Recipe.from_dict({"name": "mine", "cache": INTERVAL}).to_toml()
    setting = {"recipe": "mine.toml", "toml": toml}
    assert setting_of(scored("schedule", setting, 0.1)) == setting
    assert setting_of(failed_row("schedule", "killed")) is None


def test_hastens_rows_come_first_then_the_closest(tmp_path: Path) -> None:
    rows = filled(
        tmp_path / "new",
        failed_row("SeaCache", "killed"),
        scored("MagCache", {"threshold": 0.1}, 0.2),
        scored("TaylorSeer", {"max_order": 1}, 0.1),
        scored("fewer steps, Euler", {"steps": 17}, 0.1),
        scored("interval, reuse", {**INTERVAL, "predictor": "reuse"}, 0.3),
    ).rows
    assert [(row.recipe, row.role) for row in rows] == [
        ("baseline", "baseline"),
        ("interval, reuse", "recipe"),
        ("fewer steps, Euler", "rival"),
        ("TaylorSeer", "peer"),
        ("MagCache", "peer"),
        ("SeaCache", "peer"),
    ]
    assert rows[2].rival_of == ("interval, reuse",)


def test_a_later_run_replaces_what_it_measured_and_nothing_else(tmp_path: Path) -> None:
    old = scored("MagCache", {"threshold": 0.1}, 0.2)
    filled(tmp_path, old, failed_row("DBCache", "killed"))
    new = scored("DBCache", {"threshold": 0.2}, 0.1)
    rows = filled(tmp_path, failed_row("MagCache", "not begun before the deadline"), new).rows
    assert rows[1:] == (new, old)


def test_the_products_table_shows_them(tmp_path: Path) -> None:
    results = filled(
        tmp_path,
        scored("MagCache", {"threshold": 0.1}, 0.2, tried=2),
        failed_row("Heun", "takes no sigmas", unsupported=True),
    )
    text = table.to_markdown(results)
    assert "| recipe | steps computed | LPIPS | SSIM | PSNR dB | evaluations |" in text
    assert "unsupported: takes no sigmas" in text
    assert "threshold 0.1" in text


def test_folders_are_named_for_model_budget_and_depth() -> None:
    root = Path("results")
    assert folder_of(root, "tiny", 17) == root / "tiny-17"
    assert folder_of(root, "tiny", 17, blocks=57) == root / "tiny-as-57-blocks-17"
    assert package_of("DBCache") == "cache-dit"
    assert package_of("recipe:mine.toml") == "hasten"
