"""A lock on a folder, which the kernel releases when the process ends, even if it is killed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from hasten.errors import InputError

LOCK = ".hasten-lock"


class FolderLock:
    """Context manager that locks a folder for this process.

    The lock is on a file in the folder, which is removed at the end of the block. After a crash
    the file remains, but is not locked.

    Args:
        folder: An existing, writable folder.

    Raises:
        InputError: Another process holds the lock, or the folder cannot be locked. Entering the
            block does not wait.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor = -1

    def __enter__(self) -> Self:
        path = self.folder / LOCK
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            while True:
                self._descriptor = os.open(path, flags, 0o666)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(path, self._descriptor):
                    return self
                os.close(self._descriptor)  # the previous holder has just removed it
        except BlockingIOError:
            os.close(self._descriptor)
            raise InputError(
                f"{self.folder}: another hasten process is writing to this folder",
                "wait until it has finished, or choose another --out",
            ) from None
        except OSError as error:
            raise InputError(
                f"{path}: cannot be locked: {error.strerror}",
                "choose another --out, on a disk that supports file locks",
            ) from None

    def __exit__(self, *_: object) -> None:
        (self.folder / LOCK).unlink(missing_ok=True)
        os.close(self._descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` still refers to the open file, not to a newer file with the same name."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
