"""Damaged results: a clear error, or results whose every number adds up and can be shown."""

from __future__ import annotations

import copy
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from hasten.errors import InputError
from hasten.report import html, plots, table
from hasten.report.pictures import Album, collect
from hasten.results import Results
from hasten.results_file import read_results
from tests.benchmark.plans import damage
from tests.report.builders import make_results
from tests.report.test_html import HOSTILE, Page

pytestmark = pytest.mark.fuzz

VALUES: list[Any] = [
    *(None, True, 0, -1, 1, 7, 99, 0.5, -0.0, 1e-320, 1e-9, 1e308, 2**62, 10**30, 3.0),
    *("", "x", "0", "\0", "\x1b[31m", "a\nb", "../x", "/dev/zero", "images", "\u202e", "$x_{y$"),
    *("baseline", "baseline-again", "rival", "ok", "failed", "y" * 5000, *HOSTILE),
    *([], {}, [0], [None], {"id": 0}, ["baseline"], [1.0, 2.0]),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in it."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [path, *(found for key, child in children for found in places(child, (*path, key)))]


def edited(data: Any, rng: random.Random) -> Any:
    """One to three values replaced, lost, doubled or exchanged."""
    data = copy.deepcopy(data)
    for _ in range(rng.randrange(1, 4)):
        *parents, last = rng.choice(places(data)[1:])
        place = data
        for key in parents:
            place = place[key]
        action = rng.randrange(5)
        if action == 0:
            del place[last]
        elif action == 1 and isinstance(place, list):
            place.insert(rng.randrange(len(place) + 1), copy.deepcopy(place[last]))
        elif action == 2 and isinstance(place[last], int | float):
            place[last] = place[last] * rng.choice([0.5, 0.999, 1.01, 2, 1e6])
        else:
            place[last] = rng.choice(VALUES)
    return data


def read_or_refused(path: Path) -> Results | None:
    """The results; None after an error of lines that each name the file."""
    refusals: list[InputError] = []
    try:
        return read_results(path)
    except InputError as error:
        refusals.append(error)
    (refusal,) = refusals
    assert refusal.faults
    assert all("\n" not in fault and str(path) in fault for fault in refusal.faults)
    return None


def check(results: Results) -> None:
    """Recompute here what readers will believe."""
    medians = {
        row.recipe: statistics.median(row.seconds_per_image.samples)
        for row in results.rows
        if row.seconds_per_image
    }
    ends = [medians[name] for name in ("baseline", "baseline-again") if name in medians]
    for row in results.rows:
        if row.speedup is not None:
            baseline = statistics.fmean(ends)
            assert row.speedup == pytest.approx(baseline / medians[row.recipe], rel=2e-3, abs=1e-3)
        for quality in row.quality:
            assert quality.n in (0, len(results.workload.prompts))


def shown(results: Results, folder: Path) -> None:
    text = html.report_page(results, collect(results, folder, folder))
    page = Page(text)
    assert len(page.named("script")) == len(page.named("style")) == 1
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert {tag for tag, _ in page.tags}.isdisjoint({"iframe", "object", "embed", "base", "b"})
    lines = [line for line in table.to_markdown(results).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(results.rows)


def test_no_edit_of_results_is_believed_or_unexpected(tmp_path: Path) -> None:
    make_results(tmp_path, count=2, size=(8, 8))
    path = tmp_path / "results.json"
    whole = json.loads(path.read_text("utf-8"))
    rng, read = random.Random(0), 0
    for turn in range(700):
        path.write_text(json.dumps(edited(whole, rng)), encoding="utf-8")
        results = read_or_refused(path)
        if results is None:
            continue
        read += 1
        check(results)
        shown(results, tmp_path)
        if turn % 12 == 0:
            plots.write_plot(results, tmp_path / "speedup.png")
    assert 20 < read < 400


def test_no_damage_of_results_is_unexpected(tmp_path: Path) -> None:
    make_results(tmp_path, count=1, pictures=False)
    path = tmp_path / "results.json"
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(400):
        path.write_bytes(damage(whole, rng))
        results = read_or_refused(path)
        if results is not None:
            check(results)
            html.report_page(results, Album("no pictures"))


def test_no_damaged_picture_is_unexpected(tmp_path: Path) -> None:
    results = make_results(tmp_path, count=1, size=(8, 8))
    path = tmp_path / results.rows[0].images[0]
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        path.write_bytes(damage(whole, rng))
        collect(results, tmp_path, tmp_path)
