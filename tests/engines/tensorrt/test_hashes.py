"""A large file is read once, and again where anything about it changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from hasten.engines.tensorrt import hashes
from hasten.engines.tensorrt.files import default_root
from hasten.engines.tensorrt.hashes import FileFacts, content_key, facts_of_file, note_facts
from hasten.errors import InputError
from tests.engines.tensorrt.test_store import flip_a_bit

KEY = content_key({"weights": "abc"})
LARGE = os.urandom(2**20)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
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


def test_small_files_are_not_remembered(root: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(LARGE[:-1])
    facts_of_file(small)
    assert not root.exists()


def test_where_a_disk_keeps_whole_seconds_fresh_files_are_not_remembered(
    root: Path, tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"
    fresh.write_bytes(LARGE)
    os.utime(fresh, ns=(10**9, 10**9))
    facts_of_file(fresh)
    assert not root.exists()


@pytest.mark.usefixtures("root")
def test_a_change_right_after_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "engine.plan"
    for _ in range(20):
        path.write_bytes(LARGE)
        before = facts_of_file(path)
        flip_a_bit(path)
        assert facts_of_file(path) != before


@pytest.mark.usefixtures("root")
def test_what_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(LARGE)
    true = hashlib.file_digest

    def slow(file: Any, name: str) -> Any:
        found = true(file, name)
        flip_a_bit(path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(hashes.hashlib, "file_digest", slow)
        wrong = facts_of_file(path)
    assert facts_of_file(path) != wrong


@pytest.mark.usefixtures("root")
def test_what_is_known_need_not_be_read(tmp_path: Path, reads: list[int]) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(LARGE)
    known = FileFacts(len(LARGE), hashlib.sha256(LARGE).hexdigest())
    note_facts(path, known)
    assert facts_of_file(path) == known
    assert not reads
    note_facts(path, known._replace(bytes=7))
    flip_a_bit(path)
    assert facts_of_file(path) != known


def test_without_a_home_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HASTEN_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    path = tmp_path / "engine.plan"
    path.write_bytes(LARGE)
    assert facts_of_file(path) == facts_of_file(path)
    with pytest.raises(InputError, match="no home directory") as caught:
        default_root()
    assert "HASTEN_CACHE" in caught.value.fix


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
