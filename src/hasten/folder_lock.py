"""One process at a time works in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from hasten.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock"]


class FolderLock:
    """A lock on an existing folder, held inside `with`; the system frees it when a process ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ".hasten-lock"
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            InputError: Another process holds it.
            OSError: The folder is missing or cannot be written.
        """
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self._descriptor = os.open(self.path, flags, 0o666)
        if fcntl is None:
            return self
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # An owner that deleted the folder while this process waited has left another file.
            if os.fstat(self._descriptor).st_ino == self.path.stat().st_ino:
                return self
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(self._descriptor)
        raise InputError(
            f"{self.folder}: another process is working there",
            "wait until it has ended, or choose another place",
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)
