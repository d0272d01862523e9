"""What a request led to, as long as it is as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hasten.engines.tensorrt import versions
from hasten.engines.tensorrt.files import DATA
from hasten.engines.tensorrt.hashes import facts_of_file
from hasten.engines.tensorrt.manifest import MANIFEST, FileEntry, Manifest
from hasten.engines.tensorrt.request_memo import finished, remember, request_key
from hasten.engines.tensorrt.store import Store
from tests.engines.tensorrt.test_manifest import made
from tests.engines.tensorrt.test_store import files_up_to, flip_a_bit


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An export of one file."""
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / DATA).write_bytes(b"weights" * 100)
    files = {DATA: FileEntry(**facts_of_file(folder / DATA)._asdict())}
    made(files=files).write(folder / MANIFEST)
    return folder


def test_what_a_request_led_to(out: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
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
    text = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**text, "model": "another"}))
    assert finished(store, "key", out) is None
    (out / MANIFEST).unlink()
    assert finished(store, "key", out) is None


@pytest.mark.parametrize("fault", ["a file", "full"])
def test_what_cannot_be_remembered_fails_nothing(out: Path, tmp_path: Path, fault: str) -> None:
    store = Store(tmp_path / "cache")
    if fault == "a file":
        store.root.write_text("")
        remember(store, "key", out, Manifest.read(out))
    else:
        with files_up_to(10):
            remember(store, "key", out, Manifest.read(out))
    assert finished(store, "key", out) is None


def test_another_version_is_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    before = request_key("shape:flux.1-dev", {})
    monkeypatch.setattr(versions, "version_of", lambda name: f"{name} of another day")
    assert request_key("shape:flux.1-dev", {}) != before


def test_a_request_s_key(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    weights = tmp_path / "inner" / "weights"
    weights.write_text("1")
    key = request_key(tmp_path, {"out": Path("engine")})
    assert request_key(tmp_path, {"out": Path("engine")}) == key
    assert request_key(tmp_path, {"out": Path("other")}) != key
    assert request_key("shape:flux.1-dev", {"out": Path("engine")}) != key
    times = weights.stat()
    weights.write_text("2")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert request_key(tmp_path, {"out": Path("engine")}) != key, "same size and time"
