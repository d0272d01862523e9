"""Text files of users: encodings, and one line for each way in which reading fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import InputError
from hasten.user_files import control_character, expand_user, read_text


def read(path: Path | str) -> str:
    return read_text(path, "recipe file", "give another")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_editors(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "größe.toml"
    path.write_text("für zwei\n紅色", encoding)
    assert read(path) == "für zwei\n紅色"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"caf\xe9", "not UTF-8 text .byte 3"),
        (b"\xff\xfea", "not UTF-16 text"),
        (b"a" * (2**26 + 1), "larger than 64 MiB"),
    ],
    ids=["latin-1", "half", "large"],
)
def test_content_that_is_no_text(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "nowhere: no such recipe file"),
        (".", "a directory, not a recipe file"),
        ("a\0b", "a b: embedded null byte"),
        ("x" * 5000, "File name too long"),
        ("~nosuchuser/a.toml", "no home directory for ~nosuchuser"),
    ],
)
def test_paths_that_lead_nowhere(path: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read(path)
    assert caught.value.fix
    assert len(caught.value.faults[0]) <= 400


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_a_device_without_end_is_not_read_for_ever() -> None:
    with pytest.raises(InputError, match="larger than 64 MiB"):
        read("/dev/zero")


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_user("~/a") == tmp_path / "a"
    assert expand_user("a") == Path("a")


@given(st.text())
def test_what_is_found_no_terminal_obeys(text: str) -> None:
    found = control_character(text)
    assert (found is None) == all(c.isspace() or ord(c) >= 160 or 32 <= ord(c) < 127 for c in text)
    assert control_character("\x1b[2J") == "U+001B"
    assert control_character(os.fsdecode(b"caf\xe9")) == "U+DCE9"
