"""The output folder: what is replaced, what is never touched, what can be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.benchmark.plan import Plan
from hasten.benchmark.store import Store
from hasten.errors import InputError
from hasten.recipe import IntervalCache, Recipe, resolve
from hasten.results import Row, summarize_seconds
from tests.benchmark.plans import files_below, make_plan

OK = Row(recipe="baseline", status="ok", seconds_per_image=summarize_seconds([1.0]))


def opened(store: Store, plan: Plan, *, resume: bool = False) -> None:
    store.check()
    store.open(plan.rows, plan.workload, resume=resume)


def test_a_new_benchmark_replaces_an_earlier_ones_files_and_nothing_else(tmp_path: Path) -> None:
    store, plan = Store(tmp_path), make_plan([resolve("cache")], rounds=2)
    opened(store, plan)
    mine = {"images/cache/000.png", "images/cache/001.png", "rows/cache.json", "logs/cache.log"}
    mine |= {"rows/cache@2.json", ".work/cache/000.safetensors", "results.json", "report.html"}
    theirs = {"images/cache/cat.png", "images/dog/000.png", "rows/other.json", "notes.md"}
    theirs |= {"images/cache/002.png"}
    for name in mine | theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    opened(store, make_plan([]), resume=True)
    assert files_below(tmp_path) == mine | theirs | {".bench.json"}
    opened(store, make_plan([]))
    assert files_below(tmp_path) == theirs | {".bench.json"}


def test_a_folder_with_somebody_elses_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"results\.json, images"):
        Store(tmp_path).check()


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_an_out_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file, not a folder"):
        Store(tmp_path / "file" / below).check()


def test_a_written_row_comes_back(tmp_path: Path) -> None:
    store, plan = Store(tmp_path), make_plan([])
    opened(store, plan)
    row = plan.rows[0]
    assert store.finished_row(row, 0, plan.identity(row)) is None
    store.write_row(OK, 0, plan.identity(row))
    assert store.finished_row(row, 0, plan.identity(row)) == OK
    assert store.finished_row(row, 1, plan.identity(row)) is None


def test_rounds_may_be_added(tmp_path: Path) -> None:
    store, plan = Store(tmp_path), make_plan([])
    opened(store, plan)
    store.write_row(OK, 0, plan.identity(plan.rows[0]))
    more = make_plan([], rounds=3)
    assert store.finished_row(more.rows[0], 0, more.identity(more.rows[0])) == OK


def test_failed_and_broken_rows_are_measured_again(tmp_path: Path) -> None:
    store, plan = Store(tmp_path), make_plan([])
    opened(store, plan)
    row = plan.rows[0]
    failed = Row(recipe="baseline", status="failed", reason="no luck")
    store.write_row(failed, 0, plan.identity(row))
    assert store.finished_row(row, 0, plan.identity(row)) is None
    store.row_file("baseline", 0).write_text('{"identity": ')
    assert store.finished_row(row, 0, plan.identity(row)) is None


def test_a_mismatch_names_what_differs(tmp_path: Path) -> None:
    store, plan = Store(tmp_path), make_plan([])
    opened(store, plan)
    store.write_row(OK, 0, plan.identity(plan.rows[0]))
    other = make_plan([], steps=7, size="64x64", seed=3, references=("baseline",))
    newer = other.environment.model_copy(update={"torch": "3", "date": "later"})
    other = Plan(other.workload, newer, "cpu", other.rows, other.references)
    with pytest.raises(InputError) as caught:
        store.finished_row(other.rows[0], 0, other.identity(other.rows[0]))
    said = [fault.split("cannot resume: ")[1] for fault in caught.value.faults]
    assert said == [
        "width was 48, now is 64",
        "height was 32, now is 64",
        "steps was 6, now is 7",
        "seed was 0, now is 3",
        "the prompts are others",
        "torch was 2, now is 3",
    ]
    assert "--resume" in caught.value.fix


def test_a_changed_recipe_is_a_mismatch(tmp_path: Path) -> None:
    store = Store(tmp_path)
    then = make_plan([Recipe(name="mine", cache=IntervalCache(interval=2))])
    now = make_plan([Recipe(name="mine", cache=IntervalCache(interval=3))])
    opened(store, then)
    row = OK.model_copy(update={"recipe": "mine"})
    store.write_row(row, 0, then.identity(then.rows[1]))
    with pytest.raises(InputError, match="recipe 'mine' has changed"):
        store.finished_row(now.rows[1], 0, now.identity(now.rows[1]))
