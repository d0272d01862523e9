"""The report, from a small results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from studies.caching.report import at_budget, markdown, write_report
from studies.caching.results import merge


def point(budget: float | None, evaluations: float, lpips: float) -> dict[str, Any]:
    return {
        "budget": budget,
        "setting": {"steps": 17},
        "lpips": lpips,
        "ssim": 0.9,
        "psnr": 30.0,
        "evaluations": evaluations,
        "computed": evaluations,
        "n": 2,
        "per_prompt": {"lpips": [lpips, lpips]},
    }


def row(method: str, package: str, points: list[dict[str, Any]], reason: str | None = None) -> Any:
    return {"method": method, "package": package, "note": "", "points": points, "reason": reason}


@pytest.fixture
def results() -> dict[str, Any]:
    unreached = {"budget": 17, "setting": None, "reason": "too dear"}
    return {
        "schema": 1,
        "model": "tiny",
        "budgets": [25, 17],
        "workload": {"steps": 50, "prompts": "the last 2"},
        "rows": [
            row("MagCache", "diffusers", [point(25, 25.1, 0.02), unreached]),
            row("recipe:mine.toml", "hasten", [point(None, 16.0, 0.01)]),
            row("Heun", "diffusers", [], "takes no sigmas"),
        ],
    }


def test_table_has_the_best_in_bold_and_every_reason(results: dict[str, Any]) -> None:
    text = markdown(results)
    assert "| MagCache | diffusers | **0.02000** | – |" in text
    assert "| recipe:mine.toml | hasten | – | **0.01000** |" in text
    assert "- Heun: takes no sigmas" in text
    assert "- MagCache, 17 evaluations: too dear" in text


def test_rows_charged_otherwise_have_their_own_table(results: dict[str, Any]) -> None:
    deep = row("DBCache", "cache-dit", [point(25, 25.0, 0.001)]) | {"blocks": 57}
    merge(results, deep, timed=False)
    merge(results, row("DBCache", "cache-dit", [point(25, 25.0, 0.03)]), timed=False)
    above, below = markdown(results).split("## Charged as in a model of 57 blocks")
    assert "| DBCache | cache-dit | 0.03000 | – |" in above
    assert "| DBCache | cache-dit | **0.00100** | – |" in below


@pytest.mark.parametrize(("evaluations", "fits"), [(17.3, True), (17.4, False), (12.0, False)])
def test_a_recipe_serves_the_budget_it_nearly_fills(evaluations: float, fits: bool) -> None:
    recipe = row("recipe:a.toml", "hasten", [point(None, evaluations, 0.01)])
    assert (at_budget(recipe, 17) is not None) is fits


def test_report_writes_plot_and_table_beside_the_json(
    results: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(results), "utf-8")
    write_report(path)
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny.png" in (tmp_path / "tiny.md").read_text("utf-8")


def test_merge_replaces_a_row_in_place(results: dict[str, Any]) -> None:
    merge(results, row("MagCache", "diffusers", [point(25, 24.0, 0.03)]), timed=False)
    assert [r["method"] for r in results["rows"]] == ["MagCache", "recipe:mine.toml", "Heun"]
    assert results["rows"][0]["points"][0]["lpips"] == 0.03


def test_merge_of_timings_keeps_the_quality(results: dict[str, Any]) -> None:
    timing = {"budget": "25", "seconds": 0.4, "plain_seconds": 0.9}
    merge(results, row("MagCache", "diffusers", [timing]), timed=True)
    merged = results["rows"][0]["points"][0]
    assert (merged["lpips"], merged["seconds"]) == (0.02, 0.4)
    recipe = {"budget": "None", "seconds": 0.3, "plain_seconds": 0.9}
    merge(results, row("recipe:mine.toml", "hasten", [recipe]), timed=True)
    assert results["rows"][1]["points"][0]["seconds"] == 0.3
