"""What the pages say of learned schedules follows from the results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from studies.caching.figure import lpips_of
from studies.caching.results import package_of

from hasten.results import BASELINE, Row
from studies.caching import figure, resampled

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "schedules.md"
RESULTS = ROOT / "studies" / "results" / "caching"
MODELS = {"bundled": "tiny", "second": "teacher"}


@pytest.mark.parametrize("name", ["tiny", "teacher", "resampled"])
def test_the_reports_are_those_of_the_measurements(name: str) -> None:
    written = (RESULTS / f"{name}.md").read_text("utf-8")
    if name == "resampled":
        assert written == resampled.markdown(resampled.read_runs(RESULTS))
    else:
        assert written == figure.markdown(figure.read_budgets(RESULTS, name))


def test_every_point_is_of_as_many_prompts() -> None:
    for model in MODELS.values():
        for results in figure.read_budgets(RESULTS, model).values():
            scored = [row.quality_against(BASELINE) for row in results.rows]
            assert {quality.n for quality in scored if quality} == {100}


def test_the_readme_says_how_much_closer_schedules_stay() -> None:
    said = re.search(
        r"(\d+) to (\d+) times\s+lower LPIPS.*second one (\d+) to (\d+) times lower",
        (ROOT / "README.md").read_text("utf-8"),
        re.DOTALL,
    )
    assert said
    for model, least, most in (("tiny", said[1], said[2]), ("teacher", said[3], said[4])):
        closer = [1 / of_peer for _, of_peer in _ratios(model)]
        assert int(least) == int(min(closer))
        assert int(most) == round(max(closer))


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
    runs = [
        {row.recipe: row for row in results.rows}
        for results in resampled.read_runs(RESULTS).values()
    ][1:]  # the first is as learned

    def ratios(method: str) -> list[float]:
        return [lpips_of(run["schedule"]) / lpips_of(run[method]) for run in runs]

    fewer = ratios("fewer steps, Euler") + ratios("fewer steps, UniPC")
    *steps, shift, size = ratios("interval, linear")
    expected = [max(ratios("interval, reuse")), max(fewer), min(steps), max(steps), shift, size]
    assert [float(number) for number in said.groups()[:6]] == [round(one, 2) for one in expected]
    assert [int(number) for number in said.groups()[6:]] == [_closer(run) for run in runs[-2:]]


def _closer(run: dict[str, Row]) -> int:
    """On how many prompts the schedule is closer than the interval with `linear`."""
    both = [run[name].quality_against(BASELINE) for name in ("schedule", "interval, linear")]
    own, other = ([entry.lpips for entry in one.per_prompt] for one in both if one)
    return sum(mine < theirs for mine, theirs in zip(own, other, strict=True))


def _ratios(model: str) -> list[tuple[float, float]]:
    """For each budget, LPIPS of `schedule` over that of `interval, reuse`, and of the best peer."""
    found = []
    for results in figure.read_budgets(RESULTS, model).values():
        lpips = {row.recipe: lpips_of(row) for row in results.rows[1:] if row.status == "ok"}
        peers = [value for name, value in lpips.items() if package_of(name) != "hasten"]
        own = lpips["schedule"]
        found.append((own / lpips["interval, reuse"], own / min(peers)))
    return found
