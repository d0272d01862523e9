"""The folder that an export goes to: what may be replaced, and whether it can be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hasten.engines.tensorrt import folder as module
from hasten.engines.tensorrt.files import GRAPH
from hasten.engines.tensorrt.folder import PROBE, SCRATCH, check_folder, nearest
from hasten.engines.tensorrt.manifest import MANIFEST
from hasten.errors import InputError
from tests.engines.tensorrt.mounts import with_mount
from tests.engines.tensorrt.test_manifest import made


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
    assert fault.endswith("there are files in it that no export wrote, such as thesis.tex")
    assert refused(tmp_path / "thesis.tex").faults[0].endswith("thesis.tex: a file, not a folder")
    inner = refused(tmp_path / "thesis.tex" / "engine")
    assert inner.faults[0].endswith("thesis.tex: a file, not a folder")


@pytest.mark.parametrize(
    ("manifest", "fault"),
    [
        (None, "no manifest.json, so no export is there"),
        ("", "cannot be read"),
        ('{"name": "another program"}', "its schema is None"),
        ('{"schema": 1, "name": "another program"}', "hasten: Field required"),
    ],
)
def test_only_a_manifest_of_ours_makes_a_folder_ours(
    tmp_path: Path, manifest: str | None, fault: str
) -> None:
    (tmp_path / GRAPH).write_text("someone's graph")
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    error = refused(tmp_path)
    assert "model.onnx may be someone else's" in error.faults[0]
    assert fault in error.faults[0]
    assert error.fix.startswith("delete the folder if nobody needs it")
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
    assert nearest(tmp_path) == tmp_path
    assert nearest(tmp_path / "a" / "b") == tmp_path
