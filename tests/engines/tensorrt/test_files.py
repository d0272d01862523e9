"""Files of an export: where they are, and a large one is read once, until anything changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from hasten.engines.tensorrt import files
from hasten.engines.tensorrt.files import (
    FileFacts,
    bytes_below,
    damaged_files,
    default_root,
    facts_of_file,
    note_facts,
    read_regular,
    read_sealed,
    write_sealed,
)
from hasten.engines.tensorrt.store import StageStore
from hasten.errors import InputError
from tests.engines.tensorrt.test_store import flip_a_bit

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

    monkeypatch.setattr(files.hashlib, "file_digest", counted)
    return found


@pytest.mark.usefixtures("root")
def test_a_large_file_is_read_once(tmp_path: Path, reads: list[int]) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(LARGE)
    expected = FileFacts(bytes=len(LARGE), sha256=hashlib.sha256(LARGE).hexdigest())
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
        patch.setattr(files.hashlib, "file_digest", slow)
        wrong = facts_of_file(path)
    assert facts_of_file(path) != wrong


@pytest.mark.usefixtures("root")
def test_what_is_known_need_not_be_read(tmp_path: Path, reads: list[int]) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(LARGE)
    known = FileFacts(bytes=len(LARGE), sha256=hashlib.sha256(LARGE).hexdigest())
    note_facts(path, known)
    assert facts_of_file(path) == known
    assert not reads
    note_facts(path, known.model_copy(update={"bytes": 7}))
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


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "tensorrt"
    assert StageStore().root == default_root()
    monkeypatch.delenv("HASTEN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "hasten" / "tensorrt"


def test_a_folder_s_bytes(tmp_path: Path) -> None:
    assert bytes_below(tmp_path / "none") == 0
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "engine").write_bytes(b"x" * 1000)
    (tmp_path / "graph").write_bytes(b"x" * 10)
    assert bytes_below(tmp_path) == 1010
    (tmp_path / "again").hardlink_to(tmp_path / "inner" / "engine")
    assert bytes_below(tmp_path) == 1010


def devices(folder: Path) -> dict[str, str]:
    """Entries that are not files of the folder, by name; opening some would never end."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"content")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "link").symlink_to(outside / "file")
    (folder / "inner").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    (folder / "around").symlink_to("around")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    within, regular = "not a file within the folder", "not a regular file"
    return {
        "../outside/file": within,
        str(outside / "file"): within,
        "inner/file": within,
        "/dev/zero": within,
        "zero": regular,
        "link": regular,
        "loop": regular,
        "pipe": regular,
        "folder": regular,
        "": regular,
        "around/file": "",
        "a\0b": "unreadable",
        "none": "missing",
        "x" * 300: "unreadable",
    }


def test_only_regular_files_within_the_folder_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    monkeypatch.setattr(files, "facts_of_file", None)
    seven, expected = FileFacts(bytes=7, sha256="0" * 64), devices(folder)
    (folder / "large").write_bytes(b"x" * 8)
    expected["large"] = "damaged (8 bytes instead of 7)"
    found = damaged_files(folder, dict.fromkeys(expected, seven))
    for name, fault in expected.items():
        assert found[name].startswith(fault), name


def test_a_folder_may_itself_be_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "true" / "inner").mkdir(parents=True)
    (tmp_path / "true" / "inner" / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("true")
    facts = facts_of_file(tmp_path / "true" / "inner" / "file")
    assert damaged_files(tmp_path / "link", {"inner/file": facts}) == {}


def test_records_are_of_what_they_were_written_for(tmp_path: Path) -> None:
    path = tmp_path / "record"
    assert read_sealed(path) is None
    write_sealed(path, {"a": 1}, key="one")
    assert read_sealed(path, key="one") == {"a": 1}
    assert read_sealed(path, key="two") is None
    text = path.read_text()
    for damaged in (text.replace("1", "2", 1), text[:-1], "[]", "{", "\udcff", "[" * 10**5):
        path.write_bytes(damaged.encode("utf-8", "surrogateescape"))
        assert read_sealed(path, key="one") is None
    path.unlink()
    path.symlink_to("/dev/zero")
    assert read_sealed(path, key="one") is None


def test_a_regular_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert read_regular(tmp_path / "file") == b"content"
