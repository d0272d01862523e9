"""Where exports are kept, and files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.engines.tensorrt.files import bytes_below, default_root, read_object
from hasten.engines.tensorrt.store import Store


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "tensorrt"
    assert Store().root == default_root()
    monkeypatch.delenv("HASTEN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "hasten" / "tensorrt"


@pytest.mark.parametrize("text", ["[]", "{", "\udcff"])
def test_what_is_no_object_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "object"
    assert read_object(path) is None
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_object(path) is None
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}


def test_a_folder_s_bytes(tmp_path: Path) -> None:
    assert bytes_below(tmp_path / "none") == 0
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "engine").write_bytes(b"x" * 1000)
    (tmp_path / "graph").write_bytes(b"x" * 10)
    assert bytes_below(tmp_path) == 1010
    (tmp_path / "again").hardlink_to(tmp_path / "inner" / "engine")
    assert bytes_below(tmp_path) == 1010
