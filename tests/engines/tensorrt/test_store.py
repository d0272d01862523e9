"""Stages are made once, whole or not at all, and made again where their files changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hasten.engines.tensorrt.files import facts_of_file, write_sealed
from hasten.engines.tensorrt.keys import content_key
from hasten.engines.tensorrt.store import RECORD, StageStore, out_of_space
from hasten.errors import EngineError, InputError
from hasten.log import forward_log

KEY = content_key({"weights": "abc"})
EMPTY = hashlib.sha256().hexdigest()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that are logged."""
    lines: list[str] = []
    with forward_log(lines.append, lambda _: None):
        yield lines


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    return StageStore(tmp_path / "cache")


class Maker:
    """Writes two files and counts how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        assert not list(folder.iterdir())
        self.times += 1
        (folder / "a").write_bytes(b"weights" * 1000)
        (folder / "inner").mkdir()
        (folder / "inner" / "b").write_text("graph")
        return {"peak_bytes": 7}


def names_below(root: Path) -> set[str]:
    """Every file but the locks, which stay."""
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {name for name in files if not name.endswith(".lock")}


def test_made_once(store: StageStore, said: list[str]) -> None:
    make = Maker()
    first = store.stage("export", KEY, make)
    again = store.stage("export", KEY, make)
    assert make.times == 1
    assert (first.cached, again.cached) == (False, True)
    assert again.model_copy(update={"cached": False}) == first
    assert again.facts == {"peak_bytes": 7}
    assert again.files["a"] == facts_of_file(again.folder / "a")
    assert set(again.files) == {"a", "inner/b"}
    assert store.stage("export", content_key({"weights": "other"}), make).folder != first.folder
    assert store.stage("build", KEY, make).folder != first.folder
    assert make.times == 3
    assert said == []


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: os.truncate(folder / "a", 10), "a is damaged (10 bytes instead of 7000)"),
        (lambda folder: os.truncate(folder / "a", 0), "a is damaged (0 bytes instead of 7000)"),
        (lambda folder: flip_a_bit(folder / "a"), "a is damaged"),
        (lambda folder: (folder / "inner" / "b").unlink(), "inner/b is missing"),
        (lambda folder: (folder / RECORD).unlink(), "stage.json is damaged"),
        (lambda folder: (folder / RECORD).write_text("{"), "stage.json is damaged"),
        (lambda folder: (folder / RECORD).write_text("{}"), "stage.json is damaged"),
    ],
    ids=["cut short", "empty", "one bit", "missing", "no record", "no JSON", "nothing in it"],
)
def test_what_is_damaged_is_made_again(
    store: StageStore, said: list[str], damage: Callable[[Path], Any], fault: str
) -> None:
    make = Maker()
    before = store.stage("export", KEY, make)
    damage(before.folder)
    after = store.stage("export", KEY, make)
    assert (make.times, after.cached) == (2, False)
    assert after.files == before.files
    assert said == [f"export: {fault}; running the stage again"]
    assert store.stage("export", KEY, make).cached


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_nothing(store: StageStore, error: BaseException) -> None:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.stage("export", KEY, make)
    assert names_below(store.root) == set()
    assert not store.stage("export", KEY, Maker()).cached


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: a full disk, near enough."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space(store: StageStore) -> None:
    with files_up_to(1000), pytest.raises(EngineError) as caught:
        store.stage("export", KEY, Maker())
    assert caught.value.faults == (f"export: no space left for its files in {store.root}",)
    assert "HASTEN_CACHE" in caught.value.fix
    assert names_below(store.root) == set()
    assert not store.stage("export", KEY, Maker()).cached


def test_no_space_as_other_libraries_say_it(store: StageStore) -> None:
    from safetensors import SafetensorError

    def make(folder: Path) -> dict[str, Any]:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(EngineError, match="no space left"):
        store.stage("calibrate", KEY, make)
    assert out_of_space(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not out_of_space(OSError(errno.EACCES, "Permission denied"))
    assert not out_of_space(ValueError("28"))


def test_a_root_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        StageStore(tmp_path / "file").stage("export", KEY, Maker())
    assert "cannot be used" in caught.value.faults[0]
    assert "HASTEN_CACHE" in caught.value.fix


@pytest.mark.parametrize("late", [False, True], ids=["at work", "before its record"])
def test_a_store_that_is_removed_meanwhile(store: StageStore, late: bool) -> None:
    def make(folder: Path) -> dict[str, Any]:
        facts = Maker()(folder)
        shutil.rmtree(store.root)
        if not late:
            (folder / "more").write_text("")
        return facts

    with pytest.raises(EngineError, match="removed while a stage was running") as caught:
        store.stage("export", KEY, make)
    assert caught.value.fix == "run it again"
    assert not store.stage("export", KEY, Maker()).cached


def plant_file(path: Path) -> None:
    path.write_text("someone's")


def plant_link(path: Path) -> None:
    path.symlink_to(path.parent / "none")


@pytest.mark.parametrize("plant", [plant_file, plant_link])
@pytest.mark.parametrize("name", [KEY, f".{KEY}.tmp"])
def test_what_lies_in_the_place_of_a_folder_is_replaced(
    store: StageStore, name: str, plant: Callable[[Path], None]
) -> None:
    (store.root / "export").mkdir(parents=True)
    plant(store.root / "export" / name)
    assert not store.stage("export", KEY, Maker()).cached
    assert store.stage("export", KEY, Maker()).cached


@pytest.mark.parametrize("name", [KEY, f".{KEY}.tmp", f".{KEY}.lock"])
def test_links_are_not_followed(store: StageStore, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "a").write_text("someone's")
    (store.root / "export").mkdir(parents=True)
    (store.root / "export" / name).symlink_to(victim)
    with suppress(InputError):
        store.stage("export", KEY, Maker())
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"a": "someone's"}


def test_a_record_of_another_key_is_not_taken(store: StageStore) -> None:
    """Nor one of another stage: what a stage made is known by what it was made from."""
    other = content_key({"weights": "other"})
    done = store.stage("export", KEY, Maker())
    shutil.copytree(done.folder, store.root / "export" / other)
    shutil.copytree(done.folder, store.root / "build" / KEY)
    assert not store.stage("export", other, Maker()).cached
    assert not store.stage("build", KEY, Maker()).cached


@pytest.mark.parametrize("files", [[], {"a": 1}, {"a": {"bytes": 1}}, None], ids=repr)
def test_a_record_of_another_shape_is_not_taken(store: StageStore, files: Any) -> None:
    done = store.stage("export", KEY, Maker())
    record = {"facts": {}, "seconds": 0, "files": files}
    write_sealed(done.folder / RECORD, record, stage="export", key=KEY)
    assert not store.stage("export", KEY, Maker()).cached


def test_a_record_does_not_lead_out_of_its_folder(store: StageStore) -> None:
    done = store.stage("export", KEY, Maker())
    for name in ("../../outside", "/dev/zero", "zero"):
        (store.root / "outside").write_text("")
        shutil.rmtree(done.folder)
        done.folder.mkdir()
        (done.folder / "zero").symlink_to("/dev/zero")
        record = {"facts": {}, "seconds": 0, "files": {name: {"bytes": 0, "sha256": EMPTY}}}
        write_sealed(done.folder / RECORD, record, stage="export", key=KEY)
        assert not store.stage("export", KEY, Maker()).cached, name


WORKER = """
import sys, time
from pathlib import Path
from hasten.engines.tensorrt.store import StageStore
from hasten.log import forward_log

root, key, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def make(folder):
    (folder / "half").write_text("half")
    print("making", flush=True)
    if name != "quick":
        time.sleep(60 if name == "slow" else 1)
    (folder / "whole").write_text(name)
    return {}
with forward_log(lambda line: print(line, flush=True), print):
    done = StageStore(root).stage("export", key, make)
print("cached" if done.cached else "made", flush=True)
"""


def worker(store: StageStore, name: str, key: str = KEY) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WORKER, str(store.root), key, name]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_what_the_next_one_removes(store: StageStore) -> None:
    other = content_key({"another": 1})
    for key in (KEY, other):
        with worker(store, "slow", key) as killed:
            assert killed.stdout is not None
            assert killed.stdout.readline() == "making\n"
            killed.send_signal(signal.SIGKILL)
    assert names_below(store.root) == {f"export/.{other}.tmp/half"}
    done = store.stage("export", KEY, Maker())
    assert not done.cached
    own = {f"export/{KEY}/{name}" for name in ("a", "inner/b", RECORD)}
    assert names_below(store.root) == own


def test_two_processes_do_not_do_the_same_work(store: StageStore, said: list[str]) -> None:
    with worker(store, "first") as first, worker(store, "quick", content_key({})) as other:
        assert first.stdout is not None
        assert other.stdout is not None
        assert first.stdout.readline() == "making\n"
        make = Maker()
        done = store.stage("export", KEY, make)  # what is at work is not a leftover
        assert (make.times, done.cached) == (0, True)
        assert said == ["export: waiting for another process that runs this stage"]
        assert first.stdout.read() == "made\n"
        assert other.stdout.read().splitlines()[-1] == "made"


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, hasten.engines.tensorrt.folder, hasten.engines.tensorrt.preflight\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'modelopt', 'numpy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_record_is_json(store: StageStore) -> None:
    done = store.stage("export", KEY, Maker())
    record = json.loads((done.folder / RECORD).read_text())
    assert record["facts"] == {"peak_bytes": 7}
    assert 0 <= record["seconds"] < time.perf_counter()


def test_a_disk_without_locks(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(InputError, match="No locks available") as caught:
        store.stage("export", KEY, Maker())
    assert "local disk" in caught.value.fix


def test_damage_that_cannot_be_removed(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    done = store.stage("export", KEY, Maker())
    (done.folder / "a").unlink()

    def denied(*_: Any, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(done.folder))

    monkeypatch.setattr("hasten.engines.tensorrt.store.shutil.rmtree", denied)
    with pytest.raises(InputError, match="cannot be used: Permission denied"):
        store.stage("export", KEY, Maker())
