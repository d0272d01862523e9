"""The output folder: what is replaced, what is never touched, what can be resumed."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.benchmark.job import Outcome
from hasten.benchmark.plan import BenchmarkPlan
from hasten.benchmark.store import BenchmarkStore, absolute
from hasten.errors import InputError
from hasten.recipe import IntervalCache, Recipe, resolve
from hasten.results import Row, summarize_seconds
from hasten.sealed import seal, unseal
from tests.benchmark.plans import damage, files_below, make_plan

ROW = Row(
    recipe="baseline", role="baseline", status="ok", seconds_per_image=summarize_seconds([1.0])
)
OK = Outcome(row=ROW, weights="0123")


def opened(out: Path, plan: BenchmarkPlan, **how: bool) -> BenchmarkStore:
    out.mkdir(parents=True, exist_ok=True)
    store = BenchmarkStore(out, **how)
    store.check()
    store.open(plan.rows, plan.workload)
    return store


def test_a_new_benchmark_replaces_an_earlier_ones_files_and_nothing_else(tmp_path: Path) -> None:
    opened(tmp_path, make_plan([resolve("cache")], rounds=2))
    mine = {"images/cache/000.png", "images/cache/001.png", "rows/cache.json", "logs/cache.log"}
    mine |= {"rows/cache@2.json", ".work/cache/000.safetensors", "results.json", "report.html"}
    theirs = {"images/cache/cat.png", "images/dog/000.png", "rows/other.json", "notes.md"}
    theirs |= {"images/cache/002.png"}
    for name in mine | theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    opened(tmp_path, make_plan([]), resume=True)
    assert files_below(tmp_path) == mine | theirs | {".bench.json"}
    opened(tmp_path, make_plan([]), overwrite=True)
    assert files_below(tmp_path) == theirs | {".bench.json"}


def test_a_folder_with_somebody_elses_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"results\.json, images"):
        BenchmarkStore(tmp_path).check()


def test_a_used_folder_is_refused_unless_the_user_says_what_to_do(tmp_path: Path) -> None:
    plan = make_plan([])
    store = opened(tmp_path, plan)
    opened(tmp_path, plan)  # nothing was measured: nothing to lose
    store.write_row(OK, 0, plan.identity(plan.rows[0]))
    with pytest.raises(InputError, match="already holds a benchmark") as caught:
        BenchmarkStore(tmp_path).check()
    assert "--resume" in caught.value.fix
    assert "--overwrite" in caught.value.fix
    with pytest.raises(InputError, match="already holds a benchmark"):
        BenchmarkStore(tmp_path).open(plan.rows, plan.workload)
    assert store.row_file("baseline", 0).exists()
    BenchmarkStore(tmp_path, resume=True).check()
    with pytest.raises(InputError, match="remove one"):
        BenchmarkStore(tmp_path, resume=True, overwrite=True).check()
    assert files_below(opened(tmp_path, plan, overwrite=True).out) == {".bench.json"}


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_has_one_owner(tmp_path: Path, how: dict[str, bool]) -> None:
    with BenchmarkStore(tmp_path).owned():
        with pytest.raises(InputError, match="another hasten process"):
            BenchmarkStore(tmp_path, **how).check()
        with (
            pytest.raises(InputError, match="another hasten process"),
            BenchmarkStore(tmp_path).owned(),
        ):
            pass
    BenchmarkStore(tmp_path).check()
    assert files_below(tmp_path) == set()


MANIFESTS = {
    "old": '{"rows": ["../victim"], "prompts": 3, "rounds": 1}',
    "out of the folder": seal({"rows": ["../../victim"], "prompts": 3, "rounds": 1}),
    "absolute": seal({"rows": ["/victim"], "prompts": 3, "rounds": 1}),
    "endless": seal({"rows": ["a"], "prompts": 3, "rounds": 10**18}),
    "deep": "[" * 100_000,
    "digits": '{"rows": [], "prompts": ' + "9" * 5000 + "}",
    "nothing": "",
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none_of_ours_deletes_nothing(tmp_path: Path, text: str) -> None:
    out, victim = tmp_path / "deep" / "out", tmp_path / "victim"
    out.mkdir(parents=True)
    victim.mkdir()
    (victim / "000.png").write_text("precious")
    (out / ".bench.json").write_text(text)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=r"\.bench\.json: ") as caught:
            BenchmarkStore(out, **how).check()
        assert len(caught.value.faults) == 1
    assert files_below(victim) == {"000.png"}


@pytest.mark.parametrize("name", ["images", "rows", "logs", ".work", "images/cache"])
def test_no_link_is_followed(tmp_path: Path, name: str) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    plan = make_plan([resolve("cache")])
    opened(out, plan)
    victim.mkdir()
    (victim / "000.png").write_text("precious")
    if (out / name).is_dir():
        (out / name).rmdir()
    (out / name).symlink_to(victim)
    with pytest.raises(InputError, match="a link"):
        opened(out, plan, overwrite=True)
    assert files_below(victim) == {"000.png"}


@pytest.mark.parametrize("out", ["a\0b", "\udcff", "y" * 300, "y/" * 3000])
def test_an_out_that_no_folder_can_have_is_refused(out: str) -> None:
    with pytest.raises(InputError, match="not a valid folder"):
        absolute(out)


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_an_out_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file, not a folder"):
        BenchmarkStore(tmp_path / "file" / below).check()


def test_a_written_row_comes_back(tmp_path: Path) -> None:
    plan = make_plan([])
    store = opened(tmp_path, plan)
    row = plan.rows[0]
    assert store.finished_row(row, 0, plan.identity(row)) is None
    store.write_row(OK, 0, plan.identity(row))
    assert store.finished_row(row, 0, plan.identity(row)) == OK
    assert store.finished_row(row, 1, plan.identity(row)) is None


def test_rounds_may_be_added(tmp_path: Path) -> None:
    plan = make_plan([])
    store = opened(tmp_path, plan)
    store.write_row(OK, 0, plan.identity(plan.rows[0]))
    more = make_plan([], rounds=3)
    assert store.finished_row(more.rows[0], 0, more.identity(more.rows[0])) == OK


def test_failed_and_broken_rows_are_measured_again(tmp_path: Path) -> None:
    plan = make_plan([])
    store = opened(tmp_path, plan)
    row = plan.rows[0]
    failed = Row(recipe="baseline", role="baseline", status="failed", reason="no luck")
    store.write_row(Outcome(row=failed), 0, plan.identity(row))
    assert store.finished_row(row, 0, plan.identity(row)) is None
    store.row_file("baseline", 0).write_text('{"identity": ')
    assert store.finished_row(row, 0, plan.identity(row)) is None


def test_a_mismatch_names_what_differs(tmp_path: Path) -> None:
    plan = make_plan([])
    store = opened(tmp_path, plan)
    store.write_row(OK, 0, plan.identity(plan.rows[0]))
    other = make_plan([], steps=7, size="64x64", seed=3, references=("baseline",))
    newer = other.environment.model_copy(update={"torch": "3", "date": "later"})
    other = BenchmarkPlan(other.workload, newer, other.rows, other.references)
    with pytest.raises(InputError) as caught:
        store.finished_row(other.rows[0], 0, other.identity(other.rows[0]))
    differences = [fault.split("cannot resume: ")[1] for fault in caught.value.faults]
    assert differences == [
        "width was 48, now is 64",
        "height was 32, now is 64",
        "steps was 6, now is 7",
        "seed was 0, now is 3",
        "the prompts differ",
        "torch was 2, now is 3",
    ]
    assert "--overwrite" in caught.value.fix


def test_a_changed_recipe_is_a_mismatch(tmp_path: Path) -> None:
    then = make_plan([Recipe(name="mine", cache=IntervalCache(interval=2))])
    now = make_plan([Recipe(name="mine", cache=IntervalCache(interval=3))])
    store = opened(tmp_path, then)
    row = ROW.model_copy(update={"recipe": "mine", "role": "recipe"})
    store.write_row(Outcome(row=row, weights="0123"), 0, then.identity(then.rows[1]))
    with pytest.raises(InputError, match="recipe 'mine' has changed"):
        store.finished_row(now.rows[1], 0, now.identity(now.rows[1]))


def with_pictures(store: BenchmarkStore, plan: BenchmarkPlan) -> Outcome:
    """A finished baseline with two pictures and their unrounded twins."""
    names = tuple(f"images/baseline/{number:03d}.png" for number in range(2))
    floats = [f".work/baseline/{number:03d}.safetensors" for number in range(2)]
    for name in (*names, *floats):
        (store.out / name).parent.mkdir(exist_ok=True)
        (store.out / name).write_text(name)
    outcome = OK.model_copy(update={"row": ROW.model_copy(update={"images": names})})
    store.write_row(outcome, 0, plan.identity(plan.rows[0]))
    return outcome


def test_a_row_whose_pictures_changed_is_measured_again(tmp_path: Path) -> None:
    plan = make_plan([])
    store, row = opened(tmp_path, plan), plan.rows[0]
    outcome = with_pictures(store, plan)
    assert store.finished_row(row, 0, plan.identity(row)) == outcome
    assert store.has_floats("baseline", plan.workload)
    (tmp_path / ".work/baseline/001.safetensors").write_text("other")
    assert not store.has_floats("baseline", plan.workload)
    assert store.finished_row(row, 0, plan.identity(row)) == outcome
    (tmp_path / "images/baseline/001.png").write_text("other")
    assert store.finished_row(row, 0, plan.identity(row)) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 3), ("driver", "2"), ("os", "another"), ("cuda", "13"), ("commit", "abc-dirty"),
        ("python", "3.99"), ("gpu_memory_bytes", 1), ("hasten", "9"),
    ],
)  # fmt: skip
def test_another_environment_is_a_mismatch(tmp_path: Path, key: str, value: object) -> None:
    plan = make_plan([])
    store, row = opened(tmp_path, plan), plan.rows[0]
    store.write_row(OK, 0, plan.identity(row))
    changed = plan.environment.model_copy(update={key: value})
    now = replace(plan, environment=changed)
    with pytest.raises(InputError, match=f"{key} was .*, now is {value}"):
        store.finished_row(row, 0, now.identity(row))


def test_another_machine_is_a_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([])
    store, row = opened(tmp_path, plan), plan.rows[0]
    store.write_row(OK, 0, plan.identity(row))
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    with pytest.raises(InputError, match="host was "):
        store.finished_row(row, 0, plan.identity(row))


def test_a_row_of_unknown_weights_is_measured_again(tmp_path: Path) -> None:
    plan = make_plan([])
    store, row = opened(tmp_path, plan), plan.rows[0]
    store.write_row(Outcome(row=ROW), 0, plan.identity(row))
    assert store.finished_row(row, 0, plan.identity(row)) is None


def test_a_row_under_another_rows_name_is_measured_again(tmp_path: Path) -> None:
    plan = make_plan([], rounds=2)
    store, row = opened(tmp_path, plan), plan.rows[0]
    store.write_row(OK, 0, plan.identity(row))
    store.row_file("baseline", 0).rename(store.row_file("baseline", 1))
    assert store.finished_row(row, 1, plan.identity(row)) is None


@pytest.mark.fuzz
def test_no_damaged_row_is_taken_over(tmp_path: Path) -> None:
    plan = make_plan([])
    store, row = opened(tmp_path, plan), plan.rows[0]
    outcome = with_pictures(store, plan)
    whole = store.row_file("baseline", 0).read_bytes()
    rng, taken = random.Random(0), 0
    for _ in range(1500):
        damaged = damage(whole, rng)
        store.row_file("baseline", 0).write_bytes(damaged)
        found = store.finished_row(row, 0, plan.identity(row))
        taken += found is not None
        assert found is None or found == outcome
        if found is not None:  # only white space between the values differs
            assert unseal(damaged) == unseal(whole)
    assert taken < 100


@pytest.mark.fuzz
def test_no_damaged_manifest_is_believed(tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim" / "000.png"
    victim.parent.mkdir()
    victim.write_text("precious")
    store = opened(out, make_plan([resolve("cache")]))
    manifest = out / ".bench.json"
    whole = manifest.read_bytes()
    rng = random.Random(0)
    for _ in range(1500):
        manifest.write_bytes(damage(whole, rng))
        with suppress(InputError):
            store._delete(store._manifest())
            assert unseal(manifest.read_bytes()) == unseal(whole)
    assert victim.exists()
