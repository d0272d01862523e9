"""Rows put together from the parts that jobs return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from studies.caching.results import Results, failed_part, joined, settings_of


def part(*budgets: float, reason: str | None = None) -> dict[str, Any]:
    points = [{"budget": budget, "setting": {"k": budget}, "lpips": 0.1} for budget in budgets]
    row = {"method": "DBCache", "package": "cache-dit", "note": "", "blocks": None}
    return {**row, "points": points, "reason": reason, "seconds": 2.0}


def test_parts_become_one_row_with_falling_budgets() -> None:
    row = joined(part(13), part(25, 17))
    assert [point["budget"] for point in row["points"]] == [25, 17, 13]
    assert row["reason"] is None


def test_a_row_without_any_points_keeps_its_reason() -> None:
    assert joined(part(reason="cannot"), part(reason="cannot"))["reason"] == "cannot"


def test_a_job_that_broke_off_says_what_it_lacks_and_keeps_what_it_has() -> None:
    broken = failed_part(part(25), [25, 17], "killed")
    assert [point["budget"] for point in broken["points"]] == [25, 17]
    assert broken["points"][1] == {"budget": 17, "setting": None, "reason": "killed"}


def test_the_file_is_whole_after_every_part(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tiny.json"
    results = Results(path)
    for one in (part(25), failed_part(part(), [17], "killed"), part(10)):
        results.add(one, {"model": "tiny"})
        assert json.loads(path.read_text("utf-8"))["model"] == "tiny"
    (row,) = json.loads(path.read_text("utf-8"))["rows"]
    assert [point["budget"] for point in row["points"]] == [25, 17, 10]


def test_a_later_run_replaces_the_budgets_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    Results(path).add(part(25, 17), {"budgets": [25, 17], "environment": {"cpu": "one"}})
    again = Results(path)
    newer = part(17, 10)
    newer["points"][0]["lpips"] = 0.2
    again.add(newer, {"budgets": [17, 10], "environment": {"gpu": "two", "cpu": "three"}})
    points = again.data["rows"][0]["points"]
    found = [(point["budget"], point["lpips"], point["on"]) for point in points]
    assert found == [(25, 0.1, "one"), (17, 0.2, "two"), (10, 0.1, "two")]
    assert again.data["budgets"] == [25, 17, 10]
    assert set(settings_of(again.data, "DBCache", None)) == {"25", "17", "10"}
    assert settings_of(again.data, "DBCache", 57) == {}


def test_a_run_that_came_to_nothing_leaves_the_older_row(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    Results(path).add(part(25), {})
    again = Results(path)
    again.add(failed_part(part(), [25], "not begun before the deadline"), {})
    assert [point["lpips"] for point in again.data["rows"][0]["points"]] == [0.1]
