"""Files are written whole or not at all, and never through a link that somebody has put there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hasten.atomic import drafted, remove_drafts, write_bytes, write_text
from tests.engines.tensorrt.test_store import files_up_to


def test_a_text_is_written_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "text"
    write_text(path, "before")
    with files_up_to(10), pytest.raises(OSError, match="File too large"):
        write_text(path, "after " * 1000)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_with_its_own_line_endings(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "é\r\nß\n")
    assert (tmp_path / "text").read_bytes() == "é\r\nß\n".encode()


def test_an_error_in_the_block_leaves_the_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"before")

    def fail_half_way() -> None:
        with drafted(path) as draft:
            draft.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_draft_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.atomic.secrets.token_hex", lambda _: "0")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.symlink(victim, tmp_path / ".file.0.hasten-tmp")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "text")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "file").exists()


def test_a_linked_target_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    link.symlink_to(target)
    write_text(link, "text")
    assert link.is_symlink()
    assert target.read_text() == "text"


def test_drafts_of_killed_processes_go(tmp_path: Path) -> None:
    (tmp_path / ".results.json.00ff.hasten-tmp").write_text("half")
    (tmp_path / ".hidden").write_text("the user's")
    remove_drafts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]
