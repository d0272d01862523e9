"""Atomic writes, used for every file that hasten writes.

A draft is created in the target's folder, exclusively, with an unpredictable name and without
following links. It is synced and then renamed over the target. Readers see the old file or the
complete new one, even after a power failure.
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
    """Context manager that yields a draft, which replaces `path` if the block succeeds.

    Args:
        path: The file to create or replace. If it is a link, the link's target is replaced.

    Yields:
        An empty file in the same folder. Libraries that open files by name can write to it.

    Raises:
        OSError: The folder cannot be written or the disk is full; `path` is unchanged.
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
    """Create or replace a file with `text`, in UTF-8 and without translating line endings."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Create or replace a file with `content`."""
    with drafted(path) as draft:
        draft.write_bytes(content)


def remove_drafts(folder: Path) -> None:
    """Delete the drafts of killed processes in a folder that no other process is writing to."""
    for draft in folder.glob(DRAFTS):
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file to the disk. Some full disks report an error only then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable, on file systems that can sync folders."""
    try:
        sync(folder)
    except OSError:  # Windows, and some network disks
        return
