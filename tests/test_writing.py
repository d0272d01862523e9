"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.writing import write_text
from tests.engines.tensorrt.test_store import files_up_to


def test_a_text_is_written_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "text"
    write_text(path, "before")
    with files_up_to(10), pytest.raises(OSError, match="File too large"):
        write_text(path, "after " * 1000)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
