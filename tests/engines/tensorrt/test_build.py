"""Engines are built by a process of their own; whatever goes wrong there is one line and a fix."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hasten import process
from hasten.atomic import remove_drafts
from hasten.engines.tensorrt import build as building
from hasten.engines.tensorrt.build import build
from hasten.engines.tensorrt.files import DATA, facts_of_file
from hasten.errors import EngineError, HastenError, InputError, UnsupportedError
from hasten.log import forward_log
from tests.engines.tensorrt.small_graph import SHAPES, write_small_graph

TRUE_START = process.start_module


@pytest.fixture(scope="module")
def finished_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_graph(tmp_path_factory.mktemp("graph"))


@pytest.fixture
def graph(finished_graph: Path, tmp_path: Path) -> Path:
    """A graph of the test's own."""
    shutil.copytree(finished_graph.parent, tmp_path / "graph")
    return tmp_path / "graph" / finished_graph.name


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Path]:
    """Where the engine goes; after the test there is nothing beside it."""
    folder = tmp_path / "engine"
    folder.mkdir()
    yield folder / "engine.plan"
    assert {path.name for path in folder.iterdir()} <= {"engine.plan"}


def failure(graph: Path, engine: Path, *targets: str) -> HastenError:
    with pytest.raises(HastenError) as caught:
        build(graph, engine, targets or ("sm89",), SHAPES)
    assert not engine.exists()
    assert caught.value.fix
    return caught.value


def test_an_engine_for_several_gpus_the_same_every_time(graph: Path, engine: Path) -> None:
    lines: list[str] = []
    with forward_log(lambda _: None, lines.append):
        built = build(graph, engine, ("sm86", "sm89"), SHAPES)
    facts = facts_of_file(engine)
    assert built.bytes == facts.bytes
    assert lines == ["building an engine for sm86, sm89"]
    assert built.peak_bytes is not None
    assert 50 << 20 < built.peak_bytes < 2 << 30
    build(graph, engine, ("sm86", "sm89"), SHAPES)
    assert facts_of_file(engine) == facts
    build(graph, engine, ("sm89",), SHAPES)
    assert facts_of_file(engine) != facts


def test_the_peak_is_the_builder_s_own(graph: Path, engine: Path) -> None:
    """A process inherits the peak of the one that started it, by one way of asking."""
    weight = bytearray(os.urandom(4096)) * (1 << 18)  # a GiB, resident
    built = build(graph, engine, ("sm89",), SHAPES)
    assert len(weight) == 1 << 30
    assert built.peak_bytes is not None
    assert built.peak_bytes < 900 << 20


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda graph: graph.write_bytes(b""), "not a complete ONNX graph"),
        (lambda graph: graph.write_bytes(graph.read_bytes()[:300]), "not a complete ONNX graph"),
        (lambda graph: graph.write_bytes(b"\xff" * 300), "not a complete ONNX graph"),
        (lambda graph: graph.with_name(DATA).unlink(), "the weights of"),
        (lambda graph: os.truncate(graph.with_name(DATA), 100), "the weights of"),
    ],
    ids=["empty", "cut short", "noise", "no weights", "weights cut short"],
)
def test_a_damaged_graph(
    graph: Path, engine: Path, damage: Callable[[Path], Any], fault: str
) -> None:
    damage(graph)
    error = failure(graph, engine)
    assert isinstance(error, EngineError)
    (line,) = error.faults
    assert fault in line
    assert str(graph) in line
    assert "export again" in error.fix


def test_no_graph(tmp_path: Path, engine: Path) -> None:
    assert "no such graph" in str(failure(tmp_path / "none.onnx", engine))


def test_an_engine_there_before_stays(graph: Path, engine: Path) -> None:
    engine.write_text("before")
    graph.write_bytes(b"")
    with pytest.raises(EngineError):
        build(graph, engine, ("sm89",), SHAPES)
    assert engine.read_text() == "before"


@pytest.mark.parametrize("target", ["sm90", "sm100", "sm87"])
def test_no_process_for_a_target_there_is_not(
    graph: Path, engine: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "start_module", None)
    kind = InputError if target == "sm87" else UnsupportedError
    assert isinstance(failure(graph, engine, target), kind)


def test_a_text_length_that_the_graph_has_not(graph: Path, engine: Path) -> None:
    pinned = write_pinned(graph.parent / "pinned")
    assert "does not support the requested sizes" in str(failure(pinned, engine))


def write_pinned(folder: Path) -> Path:
    """cos and latents are added up, so that their lengths have to agree."""
    import onnx
    from onnx import TensorProto, helper

    folder.mkdir()
    half = TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Add", ["latents", "cos"], ["velocity"])],
        "pinned",
        [
            helper.make_tensor_value_info("latents", half, [1, "s", 16]),
            helper.make_tensor_value_info("cos", half, ["t", 16]),
        ],
        [helper.make_tensor_value_info("velocity", half, [1, "s", 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def limited(*arguments: str, **options: Any) -> Any:
    """The builder as it is, but no file may grow beyond 1000 bytes: a full disk, near enough."""
    child = TRUE_START(*arguments, **options)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    return child


def test_no_disk_space(graph: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "start_module", limited)
    error = failure(graph, engine)
    assert "cannot be written: File too large" in error.faults[0]
    assert "free some disk space" in error.fix
    monkeypatch.undo()
    build(graph, engine, ("sm89",), SHAPES)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(graph: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_full(*arguments: str, **options: Any) -> Any:
        part = Path(part_of(arguments))
        part.unlink()
        part.symlink_to("/dev/full")
        return TRUE_START(*arguments, **options)

    monkeypatch.setattr(process, "start_module", on_full)
    error = failure(graph, engine)
    assert "cannot be written: No space left on device" in error.faults[0]
    assert "free some disk space" in error.fix


def part_of(arguments: tuple[str, ...]) -> str:
    """The file that a builder with these arguments writes."""
    part: str = json.loads(arguments[1])["part"]
    return part


def has_open(process: int, path: str) -> bool:
    with suppress(FileNotFoundError):
        return any(os.readlink(file) == path for file in Path(f"/proc/{process}/fd").iterdir())
    return False


def killing(*arguments: str, **options: Any) -> Any:
    """The builder as it is, killed as soon as it has begun its file."""
    child = TRUE_START(*arguments, **options)

    def kill() -> None:
        while not has_open(child.pid, part_of(arguments)) and child.poll() is None:
            time.sleep(0.001)
        child.kill()

    threading.Thread(target=kill).start()
    return child


def test_killed_in_mid_build(graph: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "start_module", killing)
    error = failure(graph, engine)
    assert "SIGKILL (often: out of memory)" in error.faults[0]
    assert "free some memory" in error.fix
    assert "run it again" in error.fix
    monkeypatch.undo()
    build(graph, engine, ("sm89",), SHAPES)


STOPPED_BUILDER = """
import os, signal, sys, time
from pathlib import Path
from hasten import process
from hasten.engines.tensorrt.build import build
from tests.engines.tensorrt.small_graph import SHAPES
from tests.engines.tensorrt.test_build import has_open, part_of

true = process.start_module
def start(*arguments, **options):
    child = true(*arguments, **options)
    while not has_open(child.pid, part_of(arguments)):
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGSTOP)
    print(child.pid, flush=True)
    return child
process.start_module = start
build(Path(sys.argv[1]), Path(sys.argv[2]), ["sm89"], SHAPES)
"""


def test_the_builder_ends_with_the_process_that_started_it(graph: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-c", STOPPED_BUILDER, str(graph), str(tmp_path / "engine.plan")]
    parent = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert build(graph, tmp_path / "engine.plan", ("sm89",), SHAPES).bytes > 0
    remove_drafts(tmp_path)  # as the store does with the whole folder of a stage that was killed
    assert {path.name for path in tmp_path.iterdir()} == {"graph", "engine.plan"}


def is_running(process: int) -> bool:
    """A zombie, which nobody has collected yet, does not run."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_what_ctrl_c_leaves(graph: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = []

    def start(*arguments: str, **options: Any) -> Any:
        children.append(TRUE_START(*arguments, **options))
        children[0].send_signal(signal.SIGSTOP)
        ours = threading.main_thread().ident
        threading.Timer(0.3, signal.pthread_kill, [ours, signal.SIGINT]).start()
        return children[0]

    monkeypatch.setattr(process, "start_module", start)
    with pytest.raises(KeyboardInterrupt):
        build(graph, engine, ("sm89",), SHAPES)
    assert children[0].poll() == -signal.SIGKILL


def test_not_installed(graph: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = graph.parent / "blocked"
    blocked.mkdir()
    (blocked / "tensorrt_rtx.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'tensorrt_rtx'\", name='tensorrt_rtx')"
    )
    monkeypatch.syspath_prepend(str(blocked))
    error = failure(graph, engine)
    assert isinstance(error, UnsupportedError)
    assert error.fix == "pip install 'hasten[tensorrt]'"


def test_a_builder_that_breaks(graph: Path, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = graph.parent / "broken"
    broken.mkdir()
    (broken / "tensorrt_rtx.py").write_text("raise OSError('libcudart is of another version')")
    monkeypatch.syspath_prepend(str(broken))
    error = failure(graph, engine)
    assert "exit code 1: OSError: libcudart is of another version" in error.faults[0]


def test_what_is_not_known_is_said_as_it_is(engine: Path) -> None:
    told = {"errors": ["[x] cudaError 35: no driver", "Error Code 9: (a new one.\nOf two lines)"]}
    with pytest.raises(EngineError, match=r"Error Code 9: \(a new one\. Of two lines\)"):
        building._check(told, Path("model.onnx"), engine)
    with pytest.raises(EngineError, match="no reason given"):
        building._check({"errors": []}, Path("model.onnx"), engine)


def test_types_that_a_gpu_has_not(engine: Path) -> None:
    said = (
        "IBuilder::buildSerializedNetworkToStream: Error Code 1: Myelin ([pass.cpp:1500: run_passes"
        "] Cannot compile for target(s) sm75, sm86, because the model contains HW-specific "
        "datatypes: fp8_e4m3, b16. In compileGraph at /_src/optimizer/x.cpp:2012)"
    )
    with pytest.raises(EngineError) as caught:
        building._check({"errors": [said]}, Path("model.onnx"), engine)
    line = "the GPUs sm75, sm86 do not support fp8_e4m3, b16, which model.onnx uses"
    assert caught.value.faults == (line,)


def test_no_target(graph: Path, engine: Path) -> None:
    with pytest.raises(InputError, match="no target"):
        build(graph, engine, (), SHAPES)


def test_importing_loads_no_builder() -> None:
    code = (
        "import sys, hasten.engines.tensorrt.build\n"
        "assert not {'tensorrt_rtx', 'onnx', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
