"""Whole benchmarks in real processes: an engine without a model here, the bundled model last."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

import hasten
from hasten import log
from hasten.benchmark.environment import DetectedEnvironment
from hasten.benchmark.run import _job, _run_row, run_plan
from hasten.benchmark.store import BenchmarkStore
from hasten.errors import HastenError, InputError, ModelError
from hasten.recipe import Recipe, ResidualCache, ScheduleCache, resolve
from hasten.results import Results, Row
from hasten.results_file import read_results
from tests.benchmark.fake_engine import WEIGHTS
from tests.benchmark.plans import ENVIRONMENT, FAKE, files_below, make_plan, odd

pytestmark = pytest.mark.slow
SMALL = "tests.benchmark.small_engine"


class Finished(NamedTuple):
    out: Path
    results: Results
    heard: list[tuple[str, int, int]]
    lines: list[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Seven rows: cache and its rival, one that sets globals and then dies, one that looks for
    them, one that cannot run here, and the two baselines."""
    out = tmp_path_factory.mktemp("bench")
    recipes = [resolve("cache"), odd("leak and die"), odd("find the leak"), odd("unsupported")]
    heard: list[tuple[str, int, int]] = []
    lines: list[str] = []
    with log.forward_log(lines.append, lines.append):
        results = run_plan(
            make_plan(recipes),
            BenchmarkStore(out),
            engine=FAKE,
            progress=lambda *said: heard.append(said),
        )
    return Finished(out, results, heard, lines)


def named(finished: Finished, recipe: str) -> Row:
    return next(row for row in finished.results.rows if row.recipe == recipe)


def test_every_row_is_there_with_its_status(finished: Finished) -> None:
    assert [(row.recipe, row.status) for row in finished.results.rows] == [
        ("baseline", "ok"),
        ("cache", "ok"),
        ("fewer-steps-4", "ok"),
        ("leak-and-die", "failed"),
        ("find-the-leak", "ok"),
        ("unsupported", "unsupported"),
        ("baseline-again", "ok"),
    ]
    assert read_results(finished.out / "results.json") == finished.results


def test_a_killed_process_is_a_reason_and_leaves_a_log(finished: Finished) -> None:
    row = named(finished, "leak-and-die")
    assert row.reason == (
        "its process was ended by SIGKILL (often: out of memory); see logs/leak-and-die.log"
    )
    assert (finished.out / "logs" / "leak-and-die.log").exists()


def test_numbers_follow_from_the_raw_samples(finished: Finished) -> None:
    ends = (finished.results.rows[0], finished.results.rows[-1])
    medians = [statistics.median(row.seconds_per_image.samples) for row in ends]  # type: ignore[union-attr]
    baseline = statistics.fmean(medians)
    for row in finished.results.rows:
        if row.seconds_per_image is not None:
            samples = row.seconds_per_image.samples
            assert len(samples) == 2
            assert row.seconds_per_image.median == pytest.approx(statistics.median(samples))
            assert row.speedup == pytest.approx(baseline / statistics.median(samples))
            assert row.peak_memory_bytes is not None
            assert row.peak_memory_bytes > 50e6


def test_steps_computed_are_the_engines(finished: Finished) -> None:
    counts = {row.recipe: row.steps_computed for row in finished.results.rows}
    assert {name: count.mean for name, count in counts.items() if count} == {
        "baseline": 6,
        "cache": 4,
        "fewer-steps-4": 4,
        "find-the-leak": 6,
        "baseline-again": 6,
    }


def test_the_last_baseline_equals_the_first(finished: Finished) -> None:
    again = finished.results.rows[-1].quality_against("baseline")
    assert again is not None
    assert (again.lpips, again.psnr, again.n) == (0.0, 100.0, 2)
    assert again.ssim == pytest.approx(1, abs=1e-6)
    cache = named(finished, "cache").quality_against("baseline")
    assert cache is not None
    assert cache.psnr is not None
    assert cache.psnr < 100


def test_pictures_exist_and_the_unrounded_ones_are_gone(finished: Finished) -> None:
    for row in finished.results.rows:
        assert len(row.images) == (2 if row.status == "ok" else 0)
        for name in row.images:
            with Image.open(finished.out / name) as picture:
                assert picture.size == (48, 32)
    assert not (finished.out / ".work").exists()
    assert {"results.json", "report.html", "table.md"} <= files_below(finished.out)


def test_progress_says_which_row_and_how_far(finished: Finished) -> None:
    assert ("cache (2/7): render", 1, 2) in finished.heard
    assert ("cache (2/7): load, tracing", 0, 1) in finished.heard
    assert "cache (2/7): export     1.0 s" in finished.lines
    assert finished.heard[-1] == ("baseline-again (7/7): score against baseline", 2, 2)


WAITING = """
import sys
from pathlib import Path
from hasten.benchmark.run import run_plan
from hasten.benchmark.store import BenchmarkStore
from hasten.process import terminable
from tests.benchmark.fake_engine import WEIGHTS
from tests.benchmark.plans import FAKE, make_plan, odd
with terminable("go on"):
    run_plan(make_plan([odd("wait")]), BenchmarkStore(Path(sys.argv[1])), engine=FAKE,
             progress=lambda *message: print(*message, flush=True))
"""


def test_an_interrupt_keeps_what_is_done_and_resume_goes_on(tmp_path: Path) -> None:
    _end_in_second_row(tmp_path, signal.SIGINT)
    kept = read_results(tmp_path / "results.json")
    assert [row.recipe for row in kept.rows] == ["baseline"]
    assert (tmp_path / "report.html").exists()
    assert not list(tmp_path.rglob(".*tmp"))

    with pytest.raises(InputError, match="already holds a benchmark"):
        run_plan(make_plan([odd("wait")]), BenchmarkStore(tmp_path), engine=FAKE)
    store = BenchmarkStore(tmp_path, resume=True)
    with pytest.raises(InputError, match="cannot resume: steps was 6, now is 7"):
        run_plan(make_plan([odd("wait")], steps=7), store, engine=FAKE)
    heard: list[str] = []
    results = run_plan(
        make_plan([odd("wait")]),
        store,
        engine=FAKE,
        progress=lambda what, *_: heard.append(what),
    )
    assert [row.recipe for row in results.rows] == ["baseline", "wait", "baseline-again"]
    assert results.rows[0].seconds_per_image == kept.rows[0].seconds_per_image
    assert not [what for what in heard if what.startswith("baseline (")]
    again = results.rows[-1].quality_against("baseline")
    assert again is not None
    assert again.lpips == 0

    before = (tmp_path / "rows" / "wait.json").read_bytes()
    assert run_plan(make_plan([odd("wait")]), store, engine=FAKE) == results
    assert (tmp_path / "rows" / "wait.json").read_bytes() == before


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_end_of_the_benchmark_leaves_a_row_running(tmp_path: Path, how: int) -> None:
    _end_in_second_row(tmp_path, how)
    assert not [name for name in files_below(tmp_path) if name.endswith("tmp")] or how == 9
    assert [row.recipe for row in read_results(tmp_path / "results.json").rows] == ["baseline"]
    plan, store = make_plan([odd("wait")]), BenchmarkStore(tmp_path, resume=True)
    results = run_plan(plan, store, engine=FAKE)
    assert [row.status for row in results.rows] == ["ok"] * 3
    assert not [name for name in files_below(tmp_path) if name.endswith(("tmp", "lock"))]


def _end_in_second_row(out: Path, how: int) -> None:
    """Start a benchmark in a process, and end it while its second row renders."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "HASTEN_TEST_WAIT": "1"}
    command = [sys.executable, "-c", WAITING, str(out)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as parent:
        assert parent.stdout is not None
        for line in parent.stdout:
            if line.startswith("wait (2/3): render 1"):
                break
        with pytest.raises(InputError, match="another hasten process"):
            BenchmarkStore(out, resume=True).check()
        parent.send_signal(how)
        _, errors = parent.communicate(timeout=30)
    if how == signal.SIGKILL:
        assert parent.returncode == -how
    else:
        assert parent.returncode != 0
        assert errors.strip().splitlines()[-1] == "KeyboardInterrupt: go on"
    assert not _running_jobs(out)


def _running_jobs(out: Path) -> list[str]:
    """Command lines of processes that still work on a job in `out`."""
    for _ in range(50):
        lines = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(file.read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        found = [line for line in lines if "hasten.benchmark.row" in line and str(out) in line]
        if not found:
            return []
        time.sleep(0.1)
    return found


def test_a_cache_that_decides_as_it_goes_is_joined_by_its_rival(tmp_path: Path) -> None:
    """Its K is known once it has run; the rival is a row of this benchmark like any other."""
    plan = make_plan([Recipe(name="adaptive", cache=ResidualCache())])
    store = BenchmarkStore(tmp_path)
    heard: list[str] = []
    results = run_plan(plan, store, engine=FAKE, progress=lambda what, *_: heard.append(what))
    order = ["baseline", "adaptive", "fewer-steps-4", "baseline-again"]
    assert [row.recipe for row in results.rows] == order
    adaptive, rival = results.rows[1:3]
    assert adaptive.steps_computed is not None
    assert rival.steps_computed is not None
    assert round(adaptive.steps_computed.mean) == rival.steps_computed.mean == 4
    assert rival.quality_against("baseline") is not None
    assert "adaptive (2/3): render" in heard
    assert "fewer-steps-4 (3/4): render" in heard

    heard.clear()
    store.row_file("fewer-steps-4", 0).unlink()
    again = run_plan(
        plan,
        BenchmarkStore(tmp_path, resume=True),
        engine=FAKE,
        progress=lambda what, *_: heard.append(what),
    )
    assert [row.recipe for row in again.rows] == order
    assert again.rows[1].seconds_per_image == adaptive.seconds_per_image
    assert not any(what.startswith("adaptive") for what in heard)
    assert "baseline-again (4/4): render" in heard, "it comes after every row that was measured"
    BenchmarkStore(tmp_path, overwrite=True).open(plan.rows, plan.workload)
    assert files_below(tmp_path) == {".bench.json"}, "the rival's files are the benchmark's own"


def test_a_measured_rival_is_in_every_round() -> None:
    plan = make_plan([Recipe(name="adaptive", cache=ResidualCache())], rounds=3)
    turns = [turn.key for turn in plan.with_rivals({"adaptive": 3.6}).turns()]
    assert [turn for name, turn in turns if name == "fewer-steps-4"] == [0, 1, 2]
    assert turns.index(("fewer-steps-4", 0)) == turns.index(("adaptive", 0)) + 1


def test_a_model_that_cannot_be_had_raises_and_writes_no_results(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model"):
        run_plan(
            make_plan([resolve("cache")], model="owner/missing"),
            BenchmarkStore(tmp_path),
            engine=FAKE,
        )
    assert not (tmp_path / "results.json").exists()


def test_rows_of_other_weights_are_never_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_plan(make_plan([odd("wait")]), BenchmarkStore(tmp_path), engine=FAKE)
    before = files_below(tmp_path)
    monkeypatch.setenv(WEIGHTS, "fedcba9876543210")
    store = BenchmarkStore(tmp_path, resume=True)
    results = (tmp_path / "results.json").read_bytes()
    with pytest.raises(InputError, match="differ from those of earlier rows"):
        run_plan(make_plan([odd("wait"), resolve("cache")]), store, engine=FAKE)
    assert (tmp_path / "results.json").read_bytes() == results
    assert before <= files_below(tmp_path)


def test_a_folder_that_vanishes_has_its_own_line(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def vanish(stage: str, *_: int) -> None:
        if stage.startswith("baseline-again"):
            shutil.rmtree(out, ignore_errors=True)

    with pytest.raises(HastenError, match="the folder was removed") as caught:
        run_plan(make_plan([]), BenchmarkStore(out), engine=FAKE, progress=vanish)
    assert caught.value.fix


FULL = """
import resource, sys
from pathlib import Path
from hasten.benchmark.run import run_plan
from hasten.benchmark.store import BenchmarkStore
from hasten.errors import HastenError
from tests.benchmark.fake_engine import WEIGHTS
from tests.benchmark.plans import FAKE, make_plan
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    run_plan(make_plan([]), BenchmarkStore(Path(sys.argv[1])), engine=FAKE)
except HastenError as error:
    print(error.fix)
    sys.exit(error.faults[0])
"""


@pytest.mark.parametrize("room", [100, 10_000])
def test_a_disk_without_room_has_its_own_line_and_no_half_file(tmp_path: Path, room: int) -> None:
    """By a limit on the size of files, which the processes of the rows inherit."""
    out, path = tmp_path / "out", os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(out), str(room)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(("File too large", "its pictures could not be written"))
    assert done.stdout
    assert not [name for name in files_below(out) if name.endswith("tmp")]
    if (out / "results.json").exists():
        read_results(out / "results.json")
    assert not {"table.md", "report.html"} <= files_below(out)
    results = run_plan(make_plan([]), BenchmarkStore(out, resume=True), engine=FAKE)
    assert [row.status for row in results.rows] == ["ok", "ok"]


def test_a_forced_schedule_reaches_its_process_and_says_so(tmp_path: Path) -> None:
    schedule = ScheduleCache(steps=6, compute=(0, 3), fingerprint="00ff00ff00ff00ff")
    plan = make_plan([Recipe(name="foreign", cache=schedule)], limit=1, max_sequence_length=8)
    plan, store = dataclasses.replace(plan, force=True), BenchmarkStore(tmp_path)
    store.open(plan.rows, plan.workload)
    turn = plan.turns()[1]
    row = _run_row(_job(plan, store, turn, {}, SMALL), turn, store, lambda _: None).row
    assert (row.recipe, row.status) == ("foreign", "ok"), row.reason
    assert "schedule learned on another model, used by force" in row.notes


@pytest.mark.parametrize("force", [False, True])
def test_force_is_part_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    here = DetectedEnvironment(environment=ENVIRONMENT, device="cpu", dtype="float32")
    monkeypatch.setattr("hasten.benchmark.plan.detect_in_process", lambda *_: here)
    monkeypatch.setattr("hasten.benchmark.run.run_plan", lambda plan, *_, **__: plan)
    monkeypatch.setattr("hasten.benchmark.run.ShownResults.of", lambda plan, _: plan)
    plan: Any = hasten.bench("owner/name", ["baseline"], tmp_path, limit=1, force=force)
    assert plan.force is force


def test_results_have_the_command_that_repeats_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = DetectedEnvironment(environment=ENVIRONMENT, device="cpu", dtype="float32")
    monkeypatch.setattr("hasten.benchmark.plan.detect_in_process", lambda *_: here)
    monkeypatch.setattr("hasten.benchmark.run.run_plan", lambda plan, *_, **__: plan)
    monkeypatch.setattr("hasten.benchmark.run.ShownResults.of", lambda plan, _: plan)
    recipes = ["compile", resolve("cache")]
    plan: Any = hasten.bench("tiny", recipes, tmp_path, limit=1, force=True, references=["cache"])
    command = "hasten bench --recipes compile,cache --limit 1 --reference cache --force"
    assert plan.command == plan.with_rivals({}).command == command


def test_the_bundled_model_from_python(tmp_path: Path) -> None:
    results = hasten.bench(
        "tiny", ["baseline"], tmp_path, limit=1, steps=2, size="64x64", device="cpu"
    )
    assert [row.status for row in results.rows] == ["ok", "ok"]
    again = results.rows[-1].quality_against("baseline")
    assert again is not None
    assert (again.lpips, again.psnr) == (0.0, 100.0)
    assert again.ssim == pytest.approx(1, abs=1e-6)
    assert results.environment.device == "cpu"
    assert results.workload.dtype == "float32"
    assert (results.rows[0].weights_bytes or 0) > 1e6
