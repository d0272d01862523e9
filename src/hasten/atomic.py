"""Files that are whole or absent: every file that hasten writes goes through here.

A draft is created beside its target, under a name that nobody can predict, exclusively and without
following links; it is synced, then renamed over the target. Readers see the old file or the whole
new one, even after a power cut.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRAFTS = ".*.hasten-tmp"


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Write to the path that this yields; it becomes `path` when the block succeeds.

    Args:
        path: The file to create or replace. If it is a link, its target is replaced.

    Yields:
        An empty file in the same folder, owned by this process. Libraries that insist on opening
        files by name can write to it.

    Raises:
        OSError: The folder cannot be written or the disk is full; `path` is as it was.
    """
    path = path.resolve() if path.is_symlink() else path
    draft = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.hasten-tmp")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(draft, flags, 0o666))
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
        _sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text, in UTF-8 with the line endings that it has."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by these bytes."""
    with drafted(path) as draft:
        draft.write_bytes(content)


def remove_drafts(folder: Path) -> None:
    """Delete drafts that killed processes left in a folder that no other process writes to now."""
    for draft in folder.glob(DRAFTS):
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk: only then does a full disk report its error."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable, where folders can be synced."""
    try:
        sync(folder)
    except OSError:  # Windows, and some network disks
        return
