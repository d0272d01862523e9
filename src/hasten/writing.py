"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["sync", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write in one step: readers see the old file or the whole new one, even after a power cut."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, "utf-8")
        sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk: a full one may say so only now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
