"""What the pages say of learned schedules follows from the results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from studies.caching import report, resampled

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "schedules.md"
RESULTS = ROOT / "studies" / "results" / "caching"
MODELS = {"bundled": "tiny", "second": "teacher"}


@pytest.mark.parametrize("name", ["tiny", "teacher", "resampled"])
def test_the_reports_are_those_of_the_measurements(name: str) -> None:
    written = (RESULTS / f"{name}.md").read_text("utf-8").rstrip("\n")
    make = resampled.markdown if name == "resampled" else report.markdown
    assert written == make(_results(name)).rstrip("\n")


def test_every_point_is_of_as_many_prompts() -> None:
    for model in MODELS.values():
        rows = _results(model)["rows"]
        assert {point["n"] for row in rows for point in row["points"]} == {100}


def test_the_readme_says_how_much_nearer_schedules_stay() -> None:
    said = re.search(
        r"stays (\d+) to (\d+) times nearer.*second one (\d+) to (\d+) times",
        (ROOT / "README.md").read_text("utf-8"),
        re.DOTALL,
    )
    assert said
    for model, least, most in (("tiny", said[1], said[2]), ("teacher", said[3], said[4])):
        nearer = [1 / of_peer for _, of_peer in _ratios(model)]
        assert int(least) == int(min(nearer))
        assert int(most) == round(max(nearer))


def test_what_it_says_of_carried_over_schedules() -> None:
    """Worst ratios to reuse and to fewer steps; those to `linear`, other steps or other levels."""
    said = re.search(
        r"at most ([\d.]+) times the LPIPS of `interval` with `reuse` and at most ([\d.]+) times"
        r".*\(([\d.]+) to ([\d.]+) times\).*levels: ([\d.]+) and ([\d.]+) times"
        r", closer on (\d+) and (\d+) of 24",
        " ".join(PAGE.read_text("utf-8").split()),
        re.DOTALL,
    )
    assert said
    runs = [run["points"] for run in _results("resampled")["runs"][1:]]  # the first is as learned

    def ratios(method: str) -> list[float]:
        return [run["schedule"]["lpips"] / run[method]["lpips"] for run in runs]

    fewer = ratios("fewer steps, Euler") + ratios("fewer steps, UniPC")
    *steps, shift, size = ratios("interval, linear")
    expected = [max(ratios("interval, reuse")), max(fewer), min(steps), max(steps), shift, size]
    assert [float(number) for number in said.groups()[:6]] == [round(one, 2) for one in expected]
    assert [int(number) for number in said.groups()[6:]] == [_nearer(run) for run in runs[-2:]]


def _nearer(run: dict[str, Any]) -> int:
    """On how many prompts the schedule is nearer than the interval with `linear`."""
    own, other = (run[name]["per_prompt"]["lpips"] for name in ("schedule", "interval, linear"))
    return sum(mine < theirs for mine, theirs in zip(own, other, strict=True))


def _ratios(model: str) -> list[tuple[float, float]]:
    """For each budget, LPIPS of `schedule` over that of `interval, reuse`, and of the best peer."""
    results = _results(model)
    rows = {row["method"]: row for row in results["rows"]}
    found = []
    for budget in results["budgets"]:
        points = {name: report.at_budget(row, budget) for name, row in rows.items()}
        lpips = {name: point["lpips"] for name, point in points.items() if point}
        peers = [value for name, value in lpips.items() if rows[name]["package"] != "hasten"]
        own = lpips["schedule"]
        found.append((own / lpips["interval, reuse"], own / min(peers)))
    return found


def _results(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return results
