"""One process per folder: a lock that the kernel releases when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from hasten.errors import InputError

LOCK = ".hasten-lock"


class FolderLock:
    """Holds a folder for this process while its block runs.

    The lock is on a file in the folder, which is removed in the end. After a crash the file stays,
    but nothing holds it any more.

    Args:
        folder: An existing folder that can be written.

    Raises:
        InputError: Another process holds the folder, or it cannot be locked. Raised at once.
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
                os.close(self._descriptor)  # its last holder has removed it meanwhile
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
    """Whether the path leads to the open file, and not to a newer one of that name."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
