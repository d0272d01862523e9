"""An export is written into its folder whole or not at all, whatever is killed and when."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.engines.tensorrt import write
from hasten.engines.tensorrt.files import AMAX, DATA, ENGINE, GRAPH, RUNTIME_CACHE
from hasten.engines.tensorrt.folder import SCRATCH, check_folder
from hasten.engines.tensorrt.hashes import facts_of_file
from hasten.engines.tensorrt.manifest import MANIFEST, FileEntry, Manifest
from hasten.engines.tensorrt.store import Store
from hasten.engines.tensorrt.write import write_export
from hasten.errors import EngineError, InputError
from tests.engines.tensorrt.mounts import with_mount
from tests.engines.tensorrt.test_manifest import made
from tests.engines.tensorrt.test_store import files_up_to

CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.copyfile"}
KILLED = 9


class Source:
    """Stages' files, and the export that they make."""

    def __init__(self, place: Path, model: str, *names: str) -> None:
        place.mkdir()
        self.files = {name: place / name for name in names}
        for name, path in self.files.items():
            path.write_text(f"{name} of {model} " * 100)
        entries = {name: FileEntry(**facts_of_file(p)._asdict()) for name, p in self.files.items()}
        self.manifest = made(model=model, files=entries)

    def write(self, out: Path | None, said: list[str] | None = None) -> Path:
        store = Store(tell=(said if said is not None else []).append)
        written = write_export(self.manifest, self.files, out, store)
        assert written.folder is not None
        return written.folder

    def is_whole_in(self, folder: Path) -> bool:
        names = {path.name for path in folder.iterdir()}
        same = Manifest.read(folder).model == self.manifest.model
        return same and names == {MANIFEST, *self.files} and not self.manifest.damaged(folder)


@pytest.fixture
def old(tmp_path: Path) -> Source:
    return Source(tmp_path / "old", "old", GRAPH, DATA, ENGINE, AMAX)


@pytest.fixture
def new(tmp_path: Path) -> Source:
    return Source(tmp_path / "new", "new", GRAPH, DATA)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


def killed_at(change: int, act: Callable[[], Any]) -> bool:
    """Run it in a process that is gone at its so-and-so-many-th change of a file; False where it
    ended before."""
    child = os.fork()
    if child == 0:
        left = change

        def hook(event: str, _: Any) -> None:
            nonlocal left
            left -= event in CHANGES
            if left == 0:
                os._exit(KILLED)

        sys.addaudithook(hook)
        try:
            act()
        finally:
            os._exit(0 if left > 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


@pytest.mark.parametrize("start", ["nothing", "empty", "old", "old and killed"])
def test_killed_at_any_moment(tmp_path: Path, old: Source, new: Source, start: str) -> None:
    """Nobody takes half of it for an export, and the same command once more mends it."""
    for change in range(1, 1000):
        out = tmp_path / "out" / str(change)
        if start != "nothing":
            out.mkdir(parents=True)
        if start.startswith("old"):
            old.write(out)
        if start == "old and killed":
            (out / MANIFEST).rename(out / "aside")
            (out / SCRATCH).mkdir()
            (out / "aside").rename(out / SCRATCH / MANIFEST)
            (out / SCRATCH / ENGINE).write_text("half")
        killed = killed_at(change, lambda out=out: new.write(out))  # type: ignore[misc]
        try:
            found = Manifest.read(out)
        except InputError:
            pass  # nobody takes it for one
        else:
            assert found.damaged(out) == {}, change
        check_folder(out)
        new.write(out)
        assert new.is_whole_in(out), change
        if not killed:
            break
    assert change > 15


def test_files_that_are_there_stay_as_they_are(
    tmp_path: Path, new: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does what an engine became on its GPU, as long as it is that engine's."""
    out = new.write(tmp_path / "out")
    monkeypatch.setattr(write, "_place", None)
    new.write(out)
    monkeypatch.undo()
    engine = Source(tmp_path / "engine", "engine", ENGINE)
    engine.write(out)
    assert engine.is_whole_in(out)
    (out / RUNTIME_CACHE).write_text("kernels")
    engine.write(out)
    assert (out / RUNTIME_CACHE).read_text() == "kernels"
    Source(tmp_path / "other", "other", ENGINE).write(out)
    assert not (out / RUNTIME_CACHE).exists()


def test_what_is_wrong_is_said(tmp_path: Path, old: Source) -> None:
    out, said = old.write(tmp_path / "out"), list[str]()
    (out / GRAPH).unlink()
    (out / DATA).write_text("")
    old.write(out, said)
    told = f"write: {GRAPH} missing, {DATA} damaged in {out}, so it is written again"
    assert said == [told]
    assert old.is_whole_in(out)


def test_what_is_replaced_is_said(tmp_path: Path, old: Source, new: Source) -> None:
    said = list[str]()
    out = old.write(tmp_path / "out", said)
    old.write(out, said)
    assert said == []
    engine = f"the {old.manifest.precision} engine for {', '.join(old.manifest.targets)}"
    new.write(out, said)
    assert said == [f"write: {engine} of old in {out} is replaced"]
    assert new.is_whole_in(out)


def test_no_space(tmp_path: Path, old: Source, new: Source) -> None:
    out = old.write(tmp_path / "out")
    with files_up_to(1000), pytest.raises(EngineError, match="no space left"):
        new.write(out)
    assert old.is_whole_in(out)
    with files_up_to(1000), pytest.raises(EngineError, match="no space left"):
        new.write(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_error_after_one_that_was_killed(tmp_path: Path, old: Source, new: Source) -> None:
    """The folder is still known as one that an export was killed in."""
    out = old.write(tmp_path / "out")
    (out / SCRATCH).mkdir()
    (out / MANIFEST).rename(out / SCRATCH / MANIFEST)
    with files_up_to(1000), pytest.raises(EngineError, match="no space left"):
        new.write(out)
    check_folder(out)
    new.write(out)
    assert new.is_whole_in(out)


def test_in_the_cache_an_engine_takes_no_room(old: Source) -> None:
    folder = old.write(None)
    assert (folder / ENGINE).samefile(old.files[ENGINE])
    assert not (folder / GRAPH).samefile(old.files[GRAPH])
    assert old.is_whole_in(folder)


def test_a_folder_that_is_a_mount(tmp_path: Path) -> None:
    """As a container has it: nothing can be renamed over it, and nothing lies beside it."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from hasten.engines.tensorrt.folder import check_folder\n"
        "from tests.engines.tensorrt.test_write import GRAPH, Source\n"
        "place = Path(sys.argv[1])\n"
        "for model in ('first', 'second'):\n"
        "    source = Source(place / model, model, GRAPH)\n"
        "    check_folder(place / 'out')\n"
        "    source.write(place / 'out')\n"
        "    assert source.is_whole_in(place / 'out')\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    done = with_mount("rw", out, program, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert list(out.iterdir()) == []  # it was on the disk that is gone
