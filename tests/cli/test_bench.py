"""`hasten bench`: what it hands to the benchmark, and what it prints of the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.log import logger
from hasten.results import Results, Row
from tests.cli.conftest import Run
from tests.report.builders import MEASURED, TENSORRT, make_results

FAILED = Row(
    recipe="broken", role="recipe", status="failed", reason="its process was ended by SIGKILL"
)


class Benchmark:
    """Stands in for the benchmark: keeps its arguments and returns made-up results."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.asked: dict[str, Any] = {}

    def __call__(self, *, progress: Callable[[str, int, int], None], **asked: Any) -> Results:
        self.asked = asked
        progress("baseline (1/2): time", 1, 8)
        logger.info("an engine (2/2): calibrate     9.0 s")
        return self.results


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Benchmark:
    fake = Benchmark(make_results(tmp_path / "made", pictures=False))
    monkeypatch.setattr("hasten.benchmark.bench", fake)
    return fake


def test_every_option_arrives(run: Run, benchmark: Benchmark) -> None:
    ended = run(
        *("bench", "--recipes", "cache, mine.toml,", "--out", "there", "--prompts", "p.txt"),
        *("--last", 9, "--limit", 3, "--model", "m", "--device", "cpu", "--dtype", "float32"),
        *("--steps", 5, "--size", "64x32", "--seed", 2, "--guidance", "0"),
        *("--max-sequence-length", 7, "--rounds", 4, "--reference", "baseline,cache", "--resume"),
        "--force",
    )
    assert ended.code == 0, ended.err
    assert benchmark.asked == {
        "recipes": ("cache", "mine.toml"),
        "out": Path("there"),
        "prompts": "p.txt",
        "last": 9,
        "limit": 3,
        "model": "m",
        "device": "cpu",
        "dtype": "float32",
        "steps": 5,
        "size": "64x32",
        "seed": 2,
        "guidance": 0.0,
        "max_sequence_length": 7,
        "rounds": 4,
        "references": ("baseline", "cache"),
        "force": True,
        "resume": True,
        "overwrite": False,
    }


def test_what_is_not_asked_for_is_left_to_the_benchmark(run: Run, benchmark: Benchmark) -> None:
    assert run("bench").code == 0
    asked = benchmark.asked
    assert asked["recipes"] == ("baseline", "compile", "cache", "cache-compile")
    assert asked["references"] == ("baseline",)
    assert asked["force"] is False
    left = {"prompts", "last", "limit", "steps", "size", "guidance", "max_sequence_length"}
    assert {name for name, value in asked.items() if value is None} == left


@pytest.mark.usefixtures("benchmark")
def test_the_table_has_every_row_and_the_report_is_named(run: Run) -> None:
    ended = run("bench", "--out", "there")
    assert ended.code == 0
    assert ended.err == "an engine (2/2): calibrate     9.0 s\n"
    lines = ended.out.splitlines()
    assert lines[0].split()[0] == "recipe"
    for name, *_ in MEASURED:
        assert any(line.startswith(f"{name} ") for line in lines)
    assert str(TENSORRT.reason) in ended.out
    assert "Drift: " in ended.out
    assert lines[-1] == "Report: there/report.html"


def test_json_is_the_results_file(run: Run, benchmark: Benchmark) -> None:
    ended = run("bench", "--json")
    assert Results.model_validate_json(ended.out) == benchmark.results
    assert json.loads(ended.out)["schema"] == 2


def test_a_failed_row_is_an_error_after_the_table(
    run: Run, benchmark: Benchmark, tmp_path: Path
) -> None:
    benchmark.results = make_results(tmp_path / "made", pictures=False, extra_rows=(FAILED,))
    ended = run("bench")
    assert ended.code == 1
    assert "Report: out/report.html" in ended.out
    assert ended.errors == ["error: row broken failed: its process was ended by SIGKILL"]
    assert len(ended.fixes) == 1
    assert "--resume" in ended.fixes[0]


def test_nothing_measured_is_an_error(run: Run, benchmark: Benchmark, tmp_path: Path) -> None:
    made = make_results(tmp_path / "made", pictures=False)
    rows = [
        Row(recipe=row.recipe, role=row.role, status="unsupported", reason="no room")
        for row in made.rows
    ]
    benchmark.results = made.model_copy(update={"rows": tuple(rows)})
    ended = run("bench")
    assert ended.code == 1
    assert ended.errors == ["error: no row could be measured"]


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.usefixtures("benchmark")
def test_the_table_leaves_columns_out_rather_than_break_words(
    run: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    whole = {
        *run("bench").out.split(),
        *["No", "room", "here", "for", "the", "report", "has", "them."],
    }
    monkeypatch.setenv("COLUMNS", str(columns))
    out = run("bench").out
    assert max(map(len, out.splitlines())) <= columns
    left_out = " ".join(out.split()).partition("No room here for ")[2].partition(": the report")[0]
    assert bool(left_out) == (columns < 100)
    assert {word.rstrip(",:") for word in out.split()} <= {word.rstrip(",:") for word in whole}
