"""Finished stages by what they were made from, in a folder, so that no work is done twice.

ROOT/STAGE/KEY/          what a stage made; stage.json, sealed, has its files' sizes and sha256
ROOT/STAGE/.KEY.tmp/     a stage at work; left behind only by a process that was killed
ROOT/STAGE/.KEY.lock     held while one process makes or checks it; the others wait
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hasten.atomic import sync
from hasten.engines.tensorrt.files import (
    FileFacts,
    default_root,
    facts_of_file,
    fault_of_file,
    note_facts,
    read_sealed,
    write_sealed,
)
from hasten.errors import EngineError, HastenError, InputError

__all__ = ["FIX_SPACE", "Done", "StageStore", "Tell", "out_of_space"]

Tell = Callable[[str], None]
"""Reports one line to whoever waits."""

RECORD = "stage.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FIX_SPACE = (
    "free some disk space, or set HASTEN_CACHE to a folder on another disk; then run it again: "
    "finished stages are kept"
)


class Done(NamedTuple):
    """A finished stage.

    Attributes:
        folder: Where its files are.
        facts: What `make` returned.
        cached: Whether it was there already.
        seconds: What making it took, then or now.
        files: By their names in the folder.
    """

    folder: Path
    facts: dict[str, Any]
    cached: bool
    seconds: float
    files: dict[str, FileFacts]


class StageStore:
    """Stages below `root`; `tell` reports damaged files and waiting for another process."""

    def __init__(self, root: Path | None = None, tell: Tell = lambda _: None) -> None:
        self.root = root or default_root()
        self.tell = tell

    def stage(self, name: str, key: str, make: Callable[[Path], dict[str, Any]]) -> Done:
        """What `make` writes into the empty folder that it is given, made once for each key.

        The folder gets its name when it is whole. When it is found again its files are compared
        with their sha256, and it is made again where one differs.

        Args:
            name: Of the stage.
            key: Of everything that the result depends on, see `content_key`.
            make: Fills the folder and returns facts, values that JSON keeps as they are. Whatever
                it raises leaves nothing behind.

        Raises:
            InputError: The store cannot be used.
            EngineError: The disk is full.
        """
        place = self._place(name)
        with self.locked(name, key):
            try:
                _remove(place / f".{key}.tmp")
                _remove_leftovers(place)
                return self._found(place / key) or self._made(place, key, make)
            except Exception as error:
                if trouble := self._trouble(place, error):
                    raise trouble from error
                raise

    @contextmanager
    def locked(self, name: str, key: str) -> Iterator[None]:
        """One process at a time; the system frees the lock of one that was killed."""
        path = self._place(name) / f".{key}.lock"
        with _lockable(path) as file:
            if not _lock(file, path, wait=False):
                self.tell(f"{name}: another process is at it, waiting for that to end")
                _lock(file, path, wait=True)
            yield

    def _place(self, name: str) -> Path:
        place = self.root / name
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(place, error) from None
        return place

    def _trouble(self, place: Path, error: Exception) -> HastenError | None:
        """An error of the store's disk or folders, for one that a stage raised."""
        if out_of_space(error):
            fault = f"{place.name}: no space left for its files in {self.root}"
            return EngineError(fault, FIX_SPACE)
        if not place.is_dir():
            return EngineError(f"{place}: removed while a stage was at work", "run it again")
        if isinstance(error, OSError) and str(error.filename).startswith(str(self.root)):
            return _unusable(place, error)
        return None

    def _found(self, folder: Path) -> Done | None:
        if not os.path.lexists(folder):
            return None
        identity = {"stage": folder.parent.name, "key": folder.name}
        done = _read_done(folder, read_sealed(folder / RECORD, **identity))
        fault = _fault(folder, done)
        if done is not None and fault is None:
            return done
        self.tell(f"{folder.parent.name}: {fault}, so it is made again")
        _remove(folder)
        return None

    def _made(self, place: Path, key: str, make: Callable[[Path], dict[str, Any]]) -> Done:
        draft = place / f".{key}.tmp"
        start = time.perf_counter()
        draft.mkdir()
        try:
            facts = make(draft)
            seconds = round(time.perf_counter() - start, 3)
            done = Done(place / key, facts, False, seconds, _files(draft))
            files = {name: known._asdict() for name, known in done.files.items()}
            record = {"facts": facts, "seconds": seconds, "files": files}
            write_sealed(draft / RECORD, record, stage=place.name, key=key)
            os.replace(draft, place / key)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        for name, known in done.files.items():
            note_facts(done.folder / name, known)
        return done


def out_of_space(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on files is full; some libraries say so only in text."""
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    return any(f"(os error {number})" in str(error) for number in NO_SPACE)


def _read_done(folder: Path, record: dict[str, Any] | None) -> Done | None:
    """A stage by its record; None where the record is not one."""
    try:
        assert record is not None
        files = {name: FileFacts(**facts) for name, facts in record["files"].items()}
        return Done(folder, record["facts"], True, record["seconds"], files)
    except (AssertionError, AttributeError, KeyError, TypeError):
        return None


def _files(folder: Path) -> dict[str, FileFacts]:
    """What a stage has written, once that is on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync(path)
    return {path.relative_to(folder).as_posix(): facts_of_file(path) for path in paths}


def _fault(folder: Path, done: Done | None) -> str | None:
    """What is wrong with a stage's files; None where nothing is."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is not a folder"
    if done is None:
        return f"{RECORD} is not what was written"
    for name, facts in done.files.items():
        if fault := fault_of_file(folder, name, facts):
            return f"{name} is {fault}"
    return None


def _remove(path: Path) -> None:
    """Remove a folder, or what is in the place of one. Links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(place: Path) -> None:
    """Remove what killed processes left of other keys; a folder whose lock is held is at work."""
    for draft in place.glob(".*.tmp"):
        lock = place / f"{draft.stem}.lock"
        with _lockable(lock) as file:
            if _lock(file, lock, wait=False):
                _remove(draft)


@contextmanager
def _lockable(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(file: int, path: Path, *, wait: bool) -> bool:
    """Take the lock of an open file; False where another has it and we do not wait."""
    import fcntl  # not on Windows, where preflight refuses

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:  # some network disks have no locks
        raise _unusable(path, error) from None
    return True


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be used: {error.strerror or error}",
        "set HASTEN_CACHE to a folder of yours on a local disk",
    )
