"""Commands that are killed at random moments: no process is left behind, no file is half-written,
and the rerun recovers.

By default each command is killed three times in a row, once by each signal and each time a bit
later, and then finishes. With HASTEN_TEST_KILLS=10, which `make kills` sets, each signal is sent
at ten moments, spread over the measured duration of the command, to a command of its own.

The libraries take seconds to import. So commands are forked from a process that has imported them,
and "start" is `hasten generate` in an interpreter of its own, which spends its time on that.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from safetensors.torch import load_file

from hasten.engines.tensorrt.files import FileFacts, damaged_files
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest
from hasten.recipe import resolve
from hasten.results_file import read_results
from hasten.sealed import unseal
from tests.cli.conftest import Run
from tests.cli.test_app import PROGRAM

MOMENTS = int(os.environ.get("HASTEN_TEST_KILLS", "0"))  # per command and signal
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MARKER = "HASTEN_TEST_KILLED"  # in the environment of a command and of all its processes
TRIALS = 4  # to kill a command before it has ended
PATIENCE = 60.0  # seconds for processes to end

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc"),
]


class Command(NamedTuple):
    """A command that is killed.

    Attributes:
        arguments: Without `--model`, in a folder of its own that has the prompts.
        seconds: About how long it takes alone on two cores.
        result: What it made, for comparison with the undisturbed command's.
        resume: Options of the rerun.
        advice: What it prints when it is interrupted and has kept something.
        kept: Files of which one means that it has kept something.
        forked: Whether the libraries are imported already.
    """

    arguments: tuple[str, ...]
    seconds: float
    result: Callable[[Path], Any]
    resume: tuple[str, ...] = ()
    advice: str = ""
    kept: str = ""
    forked: bool = True


def picture(folder: Path) -> Any:
    """Pixels and texts of the picture."""
    with Image.open(folder / "kite.png") as image:
        image.load()
        return image.tobytes(), image.info


def schedule(folder: Path) -> str:
    return (folder / "schedule.toml").read_text("utf-8")


def benchmark(folder: Path) -> Any:
    """The rows and their pictures, which are the same for both baselines."""
    results = read_results(folder / "out" / "results.json")
    assert {row.recipe: row.status for row in results.rows} == {
        "baseline": "ok", "baseline-again": "ok",
    }  # fmt: skip
    for name in ("report.html", "table.md", "speedup.png"):
        assert (folder / "out" / name).stat().st_size > 0
    assert not (folder / "out" / ".work").exists()
    pictures = [[digest(folder / "out" / name) for name in row.images] for row in results.rows]
    assert pictures[0] == pictures[1]
    return pictures


def engine(folder: Path) -> Any:
    """The digests of all files of the export."""
    manifest = Manifest.read(folder / "engine")
    assert manifest.damaged(folder / "engine") == {}
    assert {path.name for path in (folder / "engine").iterdir()} == {
        MANIFEST,
        "recipe.toml",
        *manifest.files,
    }
    return manifest.files


SMALL = ("--prompts", "prompts.txt", "--limit", "2", "--device", "cpu")
GENERATE = ("generate", "a red kite", "--steps", "300", "--device", "cpu", "--out", "kite.png")
COMMANDS = {
    "start": Command(GENERATE, 8, picture, forked=False),
    "generate": Command(GENERATE, 1, picture),
    "calibrate": Command(
        ("calibrate", *SMALL, "--steps", "12", "--budget", "3", "--climb", "90"),
        2,
        schedule,
        ("--resume",),
        "schedule.toml.partial keeps what is done; --resume continues there",
        "schedule.toml.partial/*",
    ),
    "bench": Command(
        ("bench", *SMALL, "--recipes", "baseline", "--steps", "4"),
        18,
        benchmark,
        ("--resume",),
        "fix: run the same command with --resume: it keeps the finished rows",
        "out/rows/*.json",
    ),
    "export": Command(
        ("export", "tensorrt", "--precision", "bf16", "--target", "sm89", "--max-size", "64x64",
         "--device", "cpu", "--no-verify"),
        8,
        engine,
        (),
        "fix: run the same command again to go on: finished stages are kept",
        "cache/tensorrt/*/*/stage.json",
    ),
}  # fmt: skip


class Kill(NamedTuple):
    """A signal and when it is sent, as a fraction of the command's duration."""

    signal: signal.Signals
    moment: float


def planned() -> Iterator[Any]:
    """The cases: a command and the kills before it may finish."""
    for name in COMMANDS:
        rng = random.Random(f"kills of {name}")
        group = pytest.mark.xdist_group(name)
        if not MOMENTS:
            kills = [Kill(which, (i + rng.random()) / 3) for i, which in enumerate(SIGNALS)]
            yield pytest.param(name, kills, id=name, marks=group)
        for which in SIGNALS:
            for number in range(MOMENTS):
                kill = Kill(which, (number + rng.random()) / MOMENTS)
                case = f"{name}-{which.name}-{kill.moment:.3f}"
                yield pytest.param(name, [kill], id=case, marks=group)


class Undisturbed(NamedTuple):
    """How long a command takes when nobody kills it, and what it makes."""

    seconds: float
    result: Any


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(
    saved_model: Path, tmp_path_factory: pytest.TempPathFactory, server: Server
) -> Callable[[str], Undisturbed]:
    """Run a command to its end, once. Without HASTEN_TEST_KILLS its duration is a constant and
    its result is not known, except of the commands that are fast."""
    known: dict[str, Undisturbed] = {}

    def once(name: str) -> Undisturbed:
        if name not in known:
            command = COMMANDS[name]
            if not MOMENTS and command.seconds > 5:
                return Undisturbed(command.seconds, None)
            folder = tmp_path_factory.mktemp(name)
            start = time.perf_counter()
            process = Started(command, folder, saved_model, server)
            assert process.wait(500) == 0, process.errors()
            seconds = time.perf_counter() - start if MOMENTS else command.seconds
            assert_whole(folder)
            known[name] = Undisturbed(seconds, command.result(folder))
        return known[name]

    return once


SERVER = """
import json, os, signal, sys
import torch, diffusers, hasten, hasten.calibration.learn, hasten.models, hasten.generation
from diffusers import FluxPipeline
from hasten.cli import main
if sys.argv[1:]:
    import onnx, onnxscript, tensorrt_rtx, hasten.engines.tensorrt.export
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        for descriptor, path in enumerate([os.devnull, request["log"], request["log"]]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
        code = main(request["arguments"])
        sys.stderr.flush()
        os._exit(code)
    os.write(1, f"started {child}\\n".encode())
    os.write(1, f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n".encode())
"""


class Server:
    """Forks commands from a process that has imported the libraries."""

    def __init__(self) -> None:
        extra = ["tensorrt"] if find_spec("tensorrt_rtx") else []
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self, **request: Any) -> int:
        """Fork a command; returns its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{json.dumps(request)}\n".encode())
        self.process.stdin.flush()
        return self.read("started", PATIENCE * 5)

    def read(self, event: str, seconds: float) -> int:
        """The process id of a command that has started, or the exit code of one that has ended.

        Raises:
            TimeoutExpired: The server prints nothing for this long.
        """
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise subprocess.TimeoutExpired("the command", seconds)
        name, number = self.process.stdout.readline().split()
        assert name.decode() == event
        return int(number)

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


class Started:
    """A command at work in a folder, in a session of its own."""

    def __init__(
        self, command: Command, folder: Path, model: Path, server: Server, *options: str
    ) -> None:
        write_prompts(folder)
        self.started = time.time()
        self.mark = uuid.uuid4().hex
        self.log = folder.with_name(f"{folder.name}-{self.mark}.log")
        self.log.touch()
        self.process: subprocess.Popen[bytes] | None = None
        self.server = server
        arguments = [*command.arguments, "--model", str(model), *options]
        environment = {MARKER: self.mark, "HASTEN_CACHE": str(folder / "cache")}
        if command.forked:
            self.pid = server.start(
                folder=str(folder), log=str(self.log), arguments=arguments, environment=environment
            )
            return
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, *arguments],
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.pid = self.process.pid

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds) if self.process else self.server.read("ended", seconds)

    def end(self) -> None:
        """Kill it, for a test that has failed."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait(PATIENCE)

    def errors(self) -> str:
        return self.log.read_text("utf-8")

    def processes(self) -> list[str]:
        """Command lines of the command and of all that it started, which are alive."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                marked = f"{MARKER}={self.mark}".encode() in (entry / "environ").read_bytes()
                if state != "Z" and (marked or int(session) == self.pid):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while found := self.processes():
            assert time.monotonic() < deadline, found
            time.sleep(0.05)


def write_prompts(folder: Path) -> None:
    words = "".join(f"red word{number}\n" for number in range(4, 16))
    (folder / "prompts.txt").write_text(words)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_draft(path: Path) -> bool:
    """Whether the name says that the file is not finished, or is none that is read."""
    parts = [part for part in path.parts if part.startswith(".")]
    return any(part.endswith((".hasten-tmp", ".tmp")) or part == ".hasten-export" for part in parts)


def assert_whole(folder: Path, *, cut_line: bool = False) -> None:
    """Every file under a final name is what was written, by its own reader.

    Args:
        folder: Where the command worked.
        cut_line: Whether the last line of a log of trials may be cut off, as by SIGKILL.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if not is_draft(path.relative_to(folder)):
            assert_file_is_whole(path, cut_line=cut_line)


def assert_file_is_whole(path: Path, *, cut_line: bool) -> None:
    if path.suffix == ".jsonl":
        *lines, last = path.read_text("utf-8").split("\n")
        assert all(map(unseal, lines))
        assert cut_line or not last
    elif path.parent.name == ".work" and path.suffix == ".json":
        json.loads(path.read_text("utf-8"))
    elif path.name in READERS:
        READERS[path.name](path)
    elif path.suffix in READERS:
        READERS[path.suffix](path)


def read_manifest(path: Path) -> None:
    assert Manifest.read(path.parent).damaged(path.parent) == {}


def read_stage(path: Path) -> None:
    files = unseal(path.read_text("utf-8"))["files"]
    assert damaged_files(path.parent, {name: FileFacts(**files[name]) for name in files}) == {}


def read_picture(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def read_page(path: Path) -> None:
    assert path.read_text("utf-8").rstrip().endswith("</html>")


READERS: dict[str, Callable[[Path], object]] = {
    "results.json": read_results,
    MANIFEST: read_manifest,
    "stage.json": read_stage,
    ".json": lambda path: unseal(path.read_text("utf-8")),
    ".toml": lambda path: resolve(str(path)),
    ".png": read_picture,
    ".safetensors": load_file,
    ".html": read_page,
}


def assert_interrupted(command: Command, folder: Path, process: Started) -> None:
    """The command said that it was interrupted, and how to go on where it has kept something."""
    told = process.errors()
    lines = told.splitlines()
    assert "error: interrupted" in lines, told
    assert "Traceback" not in told, told
    assert "Exception ignored" not in told, told
    kept = folder.glob(command.kept) if command.kept else []
    if any(path.stat().st_mtime > process.started for path in kept):
        assert command.advice in lines, told
    drafts = [str(path) for path in folder.rglob("*") if is_draft(path.relative_to(folder))]
    assert drafts == []
    assert not list(folder.rglob(".hasten-lock"))


def killed(
    kill: Kill,
    command: Command,
    folder: Path,
    model: Path,
    server: Server,
    whole: Undisturbed,
    options: tuple[str, ...],
) -> tuple[Started, int]:
    """Start the command and kill it at its moment; returns how it ended.

    Where it had ended by then, because other work no longer shares the machine, its own duration
    counts, and it is tried again from the beginning. In a row of kills that is no surprise.
    """
    seconds = whole.seconds
    for trial in range(TRIALS):
        if trial:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        start = time.perf_counter()
        process = Started(command, folder, model, server, *options)
        try:
            code = process.wait(kill.moment * seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, kill.signal)
            try:
                code = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.end()
                raise
            break
        seconds = time.perf_counter() - start
        if not MOMENTS:
            break
    return process, code


@pytest.mark.parametrize(("name", "kills"), list(planned()))
def test_a_killed_command_leaves_nothing_half_done_and_is_run_again(
    name: str,
    kills: list[Kill],
    saved_model: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], Undisturbed],
    server: Server,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    if name == "export" and find_spec("tensorrt_rtx") is None:
        pytest.skip("the extra tensorrt is not installed")
    command, whole = COMMANDS[name], undisturbed(name)
    options: tuple[str, ...] = ()
    for kill in kills:
        process, code = killed(kill, command, tmp_path, saved_model, server, whole, options)
        process.assert_nothing_is_left()
        assert_whole(tmp_path, cut_line=kill.signal == signal.SIGKILL)
        record_property(f"ended {kill.signal.name}", code)
        if code == 130:
            assert_interrupted(command, tmp_path, process)
        elif code != 0:
            assert code == -kill.signal, process.errors()
            assert kill.signal == signal.SIGKILL or at_an_end(command, tmp_path), process.errors()
        options = command.resume
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    arguments = [*command.arguments, "--model", str(saved_model), *options]
    rerun = run(*arguments)
    assert rerun.code == 0, rerun.err
    made = command.result(tmp_path)
    assert whole.result is None or made == whole.result
    assert_whole(tmp_path)
    expected = {"prompts.txt", "kite.png", "schedule.toml", "out", "engine", "cache"}
    assert {path.name for path in tmp_path.iterdir()} <= expected
    drafts = [path for path in tmp_path.rglob("*") if is_draft(path.relative_to(tmp_path))]
    assert drafts == []


def at_an_end(command: Command, folder: Path) -> bool:
    """Whether the command had not begun or had finished its work: Python's own start and end are
    ended by a signal as by default."""
    if {path.name for path in folder.iterdir()} == {"prompts.txt"}:
        return True
    try:
        command.result(folder)
    except Exception:
        return False
    return True
