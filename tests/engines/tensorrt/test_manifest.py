"""The manifest is written whole, read back equal, and refused in one line where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hasten.engines.tensorrt.hashes import facts_of_file
from hasten.engines.tensorrt.manifest import MANIFEST, FileEntry, Manifest
from hasten.errors import InputError

SHA = "0" * 64


def made(**changes: Any) -> Manifest:
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
        "files": {},
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
    assert json.loads((tmp_path / MANIFEST).read_text())["schema"] == 1
    assert str(tmp_path) not in (tmp_path / MANIFEST).read_text()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "no manifest.json, so no export is there"),
        ("", "cannot be read"),
        ("[1]", "its schema is None"),
        ('{"schema": 2}', "its schema is 2, this hasten reads 1"),
        ('{"schema": 1}', "hasten: Field required"),
        (b"\xff\xfe", "cannot be read"),
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


def test_damaged_files(tmp_path: Path) -> None:
    for name in ("whole", "longer", "flipped", "gone"):
        (tmp_path / name).write_bytes(b"content")
    files = {p.name: FileEntry(**facts_of_file(p)._asdict()) for p in sorted(tmp_path.iterdir())}
    manifest = made(files=files)
    assert manifest.damaged(tmp_path) == {}
    (tmp_path / "longer").write_bytes(b"content!")
    (tmp_path / "flipped").write_bytes(b"cOntent")
    (tmp_path / "gone").unlink()
    assert manifest.damaged(tmp_path) == {
        "flipped": "damaged",
        "gone": "missing",
        "longer": "damaged",
    }
    (tmp_path / "gone").mkdir()
    assert manifest.damaged(tmp_path)["gone"] == "damaged"
