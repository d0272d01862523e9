"""The folder of an export: what may be replaced there, and writing it whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.engines.tensorrt import folder as module
from hasten.engines.tensorrt.files import AMAX, DATA, ENGINE, GRAPH, RUNTIME_CACHE, facts_of_file
from hasten.engines.tensorrt.folder import (
    PROBE,
    RECIPE,
    SCRATCH,
    check_folder,
    closest_existing,
    finished,
    remember,
    write_export,
)
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest
from hasten.engines.tensorrt.store import StageStore
from hasten.errors import EngineError, InputError
from hasten.log import forward_log
from hasten.recipe import resolve
from tests.engines.tensorrt.mounts import with_mount
from tests.engines.tensorrt.test_manifest import made
from tests.engines.tensorrt.test_store import files_up_to, flip_a_bit

CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.copyfile"}
KILLED = 9


def refused(out: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        check_folder(out)
    assert len(caught.value.faults) == 1
    assert "another --out" in caught.value.fix
    return caught.value


def test_what_may_be_written(tmp_path: Path) -> None:
    """Not there yet, empty, and an export, also one that another process is just checking."""
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "engine")
    assert list(tmp_path.iterdir()) == []
    for name in (GRAPH, f"{PROBE}123"):
        (tmp_path / name).write_text("")
    made().write(tmp_path / MANIFEST)
    check_folder(tmp_path)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside an export"])
def test_files_of_someone_s(tmp_path: Path, beside: bool) -> None:
    (tmp_path / "thesis.tex").write_text("")
    if beside:
        made().write(tmp_path / MANIFEST)
    fault = refused(tmp_path).faults[0]
    assert fault.endswith("the folder has files that no export wrote, such as thesis.tex")
    assert refused(tmp_path / "thesis.tex").faults[0].endswith("thesis.tex: a file, not a folder")
    inner = refused(tmp_path / "thesis.tex" / "engine")
    assert inner.faults[0].endswith("thesis.tex: a file, not a folder")


@pytest.mark.parametrize(
    ("manifest", "fault"),
    [
        (None, "no manifest.json, so there is no export"),
        ("", "not valid JSON"),
        ('{"name": "another program"}', "its schema is None"),
        ('{"schema": 2, "name": "another program"}', "it has no checksum"),
    ],
)
def test_only_a_manifest_of_ours_makes_a_folder_ours(
    tmp_path: Path, manifest: str | None, fault: str
) -> None:
    (tmp_path / GRAPH).write_text("someone's graph")
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    error = refused(tmp_path)
    assert "model.onnx may not belong to an export" in error.faults[0]
    assert fault in error.faults[0]
    assert error.fix.startswith("delete the folder if it is not needed")
    assert (tmp_path / GRAPH).read_text() == "someone's graph"


def test_an_export_that_was_killed(tmp_path: Path) -> None:
    """What lies outside is its own from when the manifest within was written, and not before."""
    (tmp_path / SCRATCH).mkdir()
    check_folder(tmp_path)
    (tmp_path / GRAPH).write_text("")
    refused(tmp_path)
    made().write(tmp_path / SCRATCH / MANIFEST)
    check_folder(tmp_path)


def test_a_folder_around_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder itself is what counts, as it is where a container has it mounted."""
    true = module.tempfile.NamedTemporaryFile

    def only_inside(dir: Path, **given: Any) -> Any:
        if dir == tmp_path:
            raise PermissionError(13, "Permission denied")
        return true(dir=dir, **given)

    monkeypatch.setattr(module.tempfile, "NamedTemporaryFile", only_inside)
    (tmp_path / "engine").mkdir()
    check_folder(tmp_path / "engine")
    for out in (tmp_path / "new", tmp_path / "deep" / "new"):
        assert refused(out).faults == (f"{tmp_path}: cannot be written: Permission denied",)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert refused(tmp_path).faults == (f"{tmp_path}: cannot be written: Permission denied",)


def test_a_disk_that_is_mounted_read_only(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from hasten.engines.tensorrt.folder import check_folder\n"
        "check_folder(Path(sys.argv[1]))\n"
    )
    for out in (tmp_path, tmp_path / "deep" / "engine"):
        done = with_mount("ro", tmp_path, program, str(out))
        assert done.returncode == 1
        assert f"{tmp_path}: cannot be written: Read-only file system" in done.stderr


def test_the_nearest_folder(tmp_path: Path) -> None:
    assert closest_existing(tmp_path) == tmp_path
    assert closest_existing(tmp_path / "a" / "b") == tmp_path


class Source:
    """Stages' files, and the export that they make."""

    def __init__(self, place: Path, model: str, *names: str) -> None:
        place.mkdir()
        self.files = {name: place / name for name in names}
        for name, path in self.files.items():
            path.write_text(f"{name} of {model} " * 100)
        entries = {name: facts_of_file(path) for name, path in self.files.items()}
        precision = "fp8" if AMAX in names else "bf16"
        targets = ("sm89",) if ENGINE in names else ()
        self.manifest = made(model=model, precision=precision, targets=targets, files=entries)

    def write(self, out: Path | None, said: list[str] | None = None) -> Path:
        with forward_log((said if said is not None else []).append, lambda _: None):
            written = write_export(self.manifest, self.files, out, StageStore())
        assert written.folder is not None
        return written.folder

    def is_whole_in(self, folder: Path) -> bool:
        names = {path.name for path in folder.iterdir()}
        same = Manifest.read(folder).model == self.manifest.model
        return (
            same
            and names - {RECIPE} == {MANIFEST, *self.files}
            and not self.manifest.damaged(folder)
        )


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
    monkeypatch.setattr(module, "_place", None)
    new.write(out)
    monkeypatch.undo()
    engine = Source(tmp_path / "engine", "engine", GRAPH, DATA, ENGINE)
    engine.write(out)
    assert engine.is_whole_in(out)
    (out / RUNTIME_CACHE).write_text("kernels")
    engine.write(out)
    assert (out / RUNTIME_CACHE).read_text() == "kernels"
    Source(tmp_path / "other", "other", GRAPH, DATA, ENGINE).write(out)
    assert not (out / RUNTIME_CACHE).exists()


def test_what_is_wrong_is_said(tmp_path: Path, old: Source) -> None:
    out, said = old.write(tmp_path / "out"), list[str]()
    (out / GRAPH).unlink()
    (out / DATA).write_text("")
    old.write(out, said)
    size = f"0 bytes instead of {old.manifest.files[DATA].bytes}"
    told = f"write: {GRAPH} missing, {DATA} damaged ({size}) in {out}; writing it again"
    assert said == [told]
    assert old.is_whole_in(out)


def test_what_is_replaced_is_said(tmp_path: Path, old: Source, new: Source) -> None:
    said = list[str]()
    out = old.write(tmp_path / "out", said)
    old.write(out, said)
    assert said == []
    engine = f"{old.manifest.precision} engine for {', '.join(old.manifest.targets)}"
    new.write(out, said)
    assert said == [f"write: replacing {engine} of old in {out}"]
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


@pytest.mark.parametrize("name", [SCRATCH, f"{SCRATCH}/{GRAPH}", f"{SCRATCH}/{MANIFEST}", GRAPH])
def test_links_are_not_followed(tmp_path: Path, old: Source, name: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / GRAPH).write_text("someone's")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if name == SCRATCH else victim / GRAPH)
    old.write(tmp_path / "out")
    assert old.is_whole_in(tmp_path / "out")
    assert {path.name: path.read_text() for path in victim.iterdir()} == {GRAPH: "someone's"}


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not a valid path") as caught:
        check_folder(tmp_path / name)
    assert caught.value.fix == "choose another --out"


def test_a_folder_in_the_place_of_a_file_is_someone_s(tmp_path: Path) -> None:
    made().write(tmp_path / MANIFEST)
    (tmp_path / GRAPH).mkdir()
    assert refused(tmp_path).faults[0].endswith("no export wrote, such as model.onnx")


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
        "from tests.engines.tensorrt.test_folder import DATA, GRAPH, Source\n"
        "place = Path(sys.argv[1])\n"
        "for model in ('first', 'second'):\n"
        "    source = Source(place / model, model, GRAPH, DATA)\n"
        "    check_folder(place / 'out')\n"
        "    source.write(place / 'out')\n"
        "    assert source.is_whole_in(place / 'out')\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    done = with_mount("rw", out, program, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert list(out.iterdir()) == []  # it was on the disk that is gone


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An export of a graph."""
    return Source(tmp_path / "graph", "graph", GRAPH, DATA).write(tmp_path / "engine")


def test_what_a_request_led_to(out: Path, tmp_path: Path) -> None:
    store = StageStore(tmp_path / "memo")
    assert finished(store, "key", out) is None
    remember(store, "key", out, Manifest.read(out))
    assert finished(store, "key", out) == Manifest.read(out)
    assert finished(store, "other", out) is None
    assert finished(store, "key", tmp_path / "elsewhere") is None
    flip_a_bit(out / DATA)
    assert finished(store, "key", out) is None
    flip_a_bit(out / DATA)
    assert finished(store, "key", out) is not None
    (out / DATA).rename(out / "aside")
    assert finished(store, "key", out) is None
    (out / "aside").rename(out / DATA)
    Manifest.read(out).model_copy(update={"model": "another"}).write(out / MANIFEST)
    assert finished(store, "key", out) is None
    (out / MANIFEST).unlink()
    assert finished(store, "key", out) is None


@pytest.mark.parametrize("fault", ["a file", "full"])
def test_what_cannot_be_remembered_fails_nothing(out: Path, tmp_path: Path, fault: str) -> None:
    store = StageStore(tmp_path / "memo")
    if fault == "a file":
        store.root.write_text("")
        remember(store, "key", out, Manifest.read(out))
    else:
        with files_up_to(10):
            remember(store, "key", out, Manifest.read(out))
    assert finished(store, "key", out) is None


def test_a_recipe_lies_beside_and_keeps_what_is_added_to_it(tmp_path: Path, old: Source) -> None:
    out = tmp_path / "out"
    old.write(out)
    recipe = resolve(out / RECIPE)
    assert recipe.engine is not None
    assert (recipe.engine.kind, recipe.engine.precision) == ("tensorrt", "fp8")
    assert Path(str(recipe.engine.path)) == out
    edited = (out / RECIPE).read_text() + "\n[cache]\n"
    (out / RECIPE).write_text(edited)
    old.write(out)
    assert (out / RECIPE).read_text() == edited
    Source(tmp_path / "graph", "new", GRAPH, DATA).write(out)
    engine = resolve(out / RECIPE).engine
    assert engine is not None
    assert (engine.kind, engine.precision) == ("onnxruntime", "bf16")
