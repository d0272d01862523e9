"""A large file is read once, and again where anything about it changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from hasten.engines.tensorrt import hashes
from hasten.engines.tensorrt.hashes import content_key, facts_of_file
from tests.engines.tensorrt.test_store import flip_a_bit

KEY = content_key({"weights": "abc"})
LARGE = os.urandom(2**20)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED", -1.0)
    return tmp_path / "cache" / "tensorrt"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each file that was read."""
    found: list[int] = []
    true = hashlib.file_digest

    def counted(file: object, name: str) -> object:
        found.append(1)
        return true(file, name)  # type: ignore[arg-type, type-var]

    monkeypatch.setattr(hashes.hashlib, "file_digest", counted)
    return found


@pytest.mark.usefixtures("root")
def test_a_large_file_is_read_once(tmp_path: Path, reads: list[int]) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(LARGE)
    expected = (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    assert facts_of_file(path) == facts_of_file(path) == expected
    assert len(reads) == 1
    flip_a_bit(path)
    assert facts_of_file(path) != expected
    flip_a_bit(path)
    assert facts_of_file(path) == expected
    assert len(reads) == 3


@pytest.mark.usefixtures("root")
def test_its_old_times_do_not_hide_a_change(tmp_path: Path) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(LARGE)
    before, times = facts_of_file(path), path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert facts_of_file(path) != before


@pytest.mark.usefixtures("root")
def test_another_file_under_the_same_name(tmp_path: Path) -> None:
    path, other = tmp_path / "engine.plan", tmp_path / "other"
    path.write_bytes(LARGE)
    other.write_bytes(LARGE[::-1])
    before = facts_of_file(path)
    os.replace(other, path)
    assert facts_of_file(path) != before


def test_small_and_fresh_files_are_not_remembered(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, fresh = tmp_path / "small", tmp_path / "fresh"
    small.write_bytes(LARGE[:-1])
    facts_of_file(small)
    fresh.write_bytes(LARGE)
    monkeypatch.setattr(hashes, "SETTLED", 60.0)
    facts_of_file(fresh)
    assert not root.exists()


def test_what_was_remembered_may_be_damaged_or_not_be_kept(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(LARGE)
    before = facts_of_file(path)
    (note,) = (root / "hashes").iterdir()
    note.write_text("{")
    assert facts_of_file(path) == before
    note.unlink()
    note.parent.rmdir()
    note.parent.write_text("a file where the folder was")
    assert facts_of_file(path) == before


def test_keys() -> None:
    assert content_key({"a": 1, "b": (2, 3)}) == content_key({"b": [2, 3], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    assert len(KEY) == 32
