"""The tables of the caching page are the committed ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from studies.caching.figure import lpips_of
from studies.caching.results import package_of

from hasten.recipe import Recipe
from hasten.results import BASELINE, Row
from studies.caching import figure, resampled

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "caching.md"
RESULTS = ROOT / "studies" / "results" / "caching"
MODELS = {"bundled": "tiny", "second": "teacher"}
TABLES = re.findall(
    r"<!-- results: ([\w/-]+) -->\n(.*?)<!-- end of results -->",
    PAGE.read_text("utf-8"),
    re.DOTALL,
)


@pytest.mark.parametrize(("name", "shown"), TABLES, ids=[name for name, _ in TABLES])
def test_its_tables_are_the_committed_ones(name: str, shown: str) -> None:
    report = (ROOT / "studies" / "results" / f"{name}.md").read_text("utf-8")
    table = report.split("\n## ")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert rows == [line for line in table.splitlines() if line.startswith("|")]


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


@pytest.mark.parametrize("model", MODELS)
def test_its_ratios_are_those_of_the_measurements(model: str) -> None:
    interval, peer = (
        re.search(rf"\| {model} model: times that of {what} \| (.*) \|", PAGE.read_text("utf-8"))
        for what in ("`interval, reuse`", "the best peer")
    )
    assert interval
    assert peer
    ratios = _ratios(MODELS[model])
    assert interval[1].split(" | ") == [f"{of_interval:.3f}" for of_interval, _ in ratios]
    assert peer[1].split(" | ") == [f"{of_peer:.3f}" for _, of_peer in ratios]


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
        r", nearer on (\d+) and (\d+) of 24",
        PAGE.read_text("utf-8"),
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
    assert [int(number) for number in said.groups()[6:]] == [_nearer(run) for run in runs[-2:]]


def _nearer(run: dict[str, Row]) -> int:
    """On how many prompts the schedule is nearer than the interval with `linear`."""
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


def test_its_recipes_are_valid() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert Recipe.from_toml(block).cache is not None


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text("utf-8")):
        assert (PAGE.parent / link).exists(), link
