"""The manifest is written whole, read back equal, and refused in one line where it is damaged."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hasten.engines.tensorrt.files import AMAX, DATA, ENGINE, GRAPH, facts_of_file
from hasten.engines.tensorrt.manifest import (
    MANIFEST,
    Manifest,
    SizeErrors,
    Verification,
)
from hasten.errors import InputError
from hasten.sealed import seal

SHA = "0" * 64
EMPTY = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}


def made(**changes: Any) -> Manifest:
    """A manifest of an FP8 engine whose files are all empty, with changes."""
    names = [GRAPH, DATA]
    names += [ENGINE] if changes.get("targets", True) else []
    names += [AMAX] if changes.get("precision", "fp8") == "fp8" else []
    values: dict[str, Any] = {
        "hasten": "1",
        "model": "tiny",
        "family": "flux",
        "weights": SHA,
        "precision": "fp8",
        "targets": ("sm89",),
        "shapes": {"text": 32, "least": 64, "best": 64, "most": 4096},
        "channels": 64,
        "text_dim": 192,
        "row_width": 13632,
        "head_dim": 48,
        "calibration": {"method": "max", "prompts": 16, "steps": 50, "sha256": SHA},
        "files": dict.fromkeys(names, EMPTY),
        "stages": [{"name": "build", "seconds": 1.5, "peak_bytes": None, "cached": False}],
        "verification": {
            "what": "fp8",
            "whole_bar": None,
            "block_bar": 0.01,
            "sizes": [{"height": 8, "width": 8, "whole": 0.03, "blocks": {"a": 0.001}}],
            "seconds": 1.0,
        },
        "versions": {"torch": "2", "onnx": None},
    }
    return Manifest.model_validate(values | changes)


def test_there_and_back(tmp_path: Path) -> None:
    manifest = made()
    manifest.write(tmp_path / MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    found = Manifest.read(tmp_path)
    assert found.folder == tmp_path
    assert found.model_copy(update={"folder": None}) == manifest
    assert json.loads((tmp_path / MANIFEST).read_text())["schema"] == 2
    assert str(tmp_path) not in (tmp_path / MANIFEST).read_text()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "no manifest.json, so there is no export"),
        ("", "it is not valid JSON"),
        ("[1]", "its schema is None, and this version reads 2"),
        ('{"schema": 1}', "its schema is 1, and this version reads 2"),
        ('{"schema": 2}', "it has no checksum"),
        (seal({"schema": 2}), "hasten: Field required"),
        (seal({"schema": 2}).replace("2,", "2, "), "hasten: Field required"),
        (made().text().replace("tiny", "flux"), "it was damaged or edited"),
        (made().text().replace("sm89", "sm86"), "it was damaged or edited"),
        (made(files={}).text(), "a missing entry in its list of files: 'amax.safetensors'"),
        (made(precision="bf16", files=made().model_dump()["files"]).text(), "an unknown entry"),
        (b"\x80{}", "it is not UTF-8 text"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"schema": %s}' % ("9" * 5000), "it is not valid JSON"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, text: Any, fault: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        Manifest.read(tmp_path)
    (line,) = caught.value.faults
    assert fault in line
    assert "hasten export tensorrt" in caught.value.fix


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "engine").write_text("")
    with pytest.raises(InputError, match="engine: a file, not the folder of an export"):
        Manifest.read(tmp_path / "engine")


@pytest.mark.parametrize(
    "change",
    [{"precision": "int4"}, {"weights": "abc"}, {"surprise": 1}, {"channels": 0}],
    ids=str,
)
def test_values_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        made(**change)


def test_a_write_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(model="old").write(tmp_path / MANIFEST)

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hasten.atomic.sync", broken)
    with pytest.raises(OSError, match="No space left"):
        made(model="new").write(tmp_path / MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    assert Manifest.read(tmp_path).model == "old"


def test_a_manifest_that_is_not_a_file_is_not_opened(tmp_path: Path) -> None:
    for kind, make in (
        ("link", lambda path: path.symlink_to("/dev/zero")),
        ("pipe", os.mkfifo),
        ("folder", Path.mkdir),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        make(folder / MANIFEST)
        with pytest.raises(InputError, match="it is not a regular file"):
            Manifest.read(folder)


def test_a_manifest_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="more than hasten ever writes"):
        Manifest.read(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    for name in ("whole", "longer", "flipped", "gone"):
        (tmp_path / name).write_bytes(b"content")
    files = {path.name: facts_of_file(path) for path in sorted(tmp_path.iterdir())}
    manifest = made(files=files)
    assert manifest.damaged(tmp_path) == {}
    (tmp_path / "longer").write_bytes(b"content!")
    (tmp_path / "flipped").write_bytes(b"cOntent")
    (tmp_path / "gone").unlink()
    longer = {"longer": "damaged (8 bytes instead of 7)"}
    assert manifest.damaged(tmp_path) == {"flipped": "damaged", "gone": "missing", **longer}
    assert manifest.damaged(tmp_path, read=False) == {"gone": "missing", **longer}


NEAR = SizeErrors(height=1, width=1, whole=0.5, blocks={"a": 0.1, "b": 0.3, "c": 0.2})
FAR = SizeErrors(height=1, width=2, whole=0.4, blocks={"a": 0.4, "b": 0.1, "c": 0.1}, control=0.2)
FOUND = Verification(what="", whole_bar=None, block_bar=1, sizes=(NEAR, FAR), seconds=0.0)


def test_the_worst_is_the_largest_error_at_any_size() -> None:
    assert (NEAR.worst, FAR.worst) == ("b", "a")
    assert (FOUND.worst_whole, FOUND.worst_block) == (0.5, 0.4)


def test_what_a_manifest_holds_is_read_as_it_was() -> None:
    kept = json.loads(json.dumps(FOUND.model_dump(mode="json")))
    assert Verification.model_validate(kept) == FOUND
    with pytest.raises(ValidationError):
        Verification.model_validate({**kept, "sizes": [{"whole": 0.5}]})


def test_importing_loads_no_torch() -> None:
    code = (
        "import sys, hasten.engines.tensorrt.manifest\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
