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
from typing import Any, BinaryIO

from pydantic import Field, ValidationError

from hasten.atomic import sync
from hasten.engines.tensorrt.files import (
    FileFacts,
    Record,
    damaged_files,
    default_root,
    facts_of_file,
    note_facts,
    read_sealed,
    write_sealed,
)
from hasten.errors import EngineError, HastenError, InputError
from hasten.log import logger

RECORD = "stage.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FIX_SPACE = (
    "free some disk space, or set HASTEN_CACHE to a folder on another disk; then run it again: "
    "finished stages are kept"
)


class Done(Record):
    """A finished stage.

    Attributes:
        facts: What `make` returned.
        seconds: What making it took, then or now.
        files: By their names in the folder.
        folder: Where its files are.
        cached: Whether it was there already.
    """

    facts: dict[str, Any]
    seconds: float
    files: dict[str, FileFacts]
    folder: Path = Field(exclude=True)
    cached: bool = Field(exclude=True)


class StageStore:
    """Stages below `root`. Damaged files and waiting for another process are logged."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

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
        file = _lock(path, wait=False)
        if file is None:
            logger.info(f"{name}: another process is at it, waiting for that to end")
            file = _lock(path, wait=True)
        assert file is not None  # it was waited for
        with file:
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
        if folder.is_symlink() or not folder.is_dir():
            fault = "it is not a folder"
        elif (done := _read_done(folder)) is None:
            fault = f"{RECORD} is not what was written"
        elif faults := damaged_files(folder, done.files):
            fault = " is ".join(next(iter(faults.items())))
        else:
            return done
        logger.info(f"{folder.parent.name}: {fault}, so it is made again")
        _remove(folder)
        return None

    def _made(self, place: Path, key: str, make: Callable[[Path], dict[str, Any]]) -> Done:
        draft, folder = place / f".{key}.tmp", place / key
        start = time.perf_counter()
        draft.mkdir()
        try:
            facts = make(draft)
            seconds = round(time.perf_counter() - start, 3)
            files = _files(draft)
            done = Done(facts=facts, seconds=seconds, files=files, folder=folder, cached=False)
            write_sealed(draft / RECORD, done.model_dump(mode="json"), stage=place.name, key=key)
            os.replace(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        for name, known in files.items():
            note_facts(folder / name, known)
        return done


def out_of_space(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on files is full; some libraries say so only in text."""
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    return any(f"(os error {number})" in str(error) for number in NO_SPACE)


def _read_done(folder: Path) -> Done | None:
    """A stage by its record; None where that is not the record of this stage."""
    record = read_sealed(folder / RECORD, stage=folder.parent.name, key=folder.name)
    try:
        return Done.model_validate({**(record or {}), "folder": folder, "cached": True})
    except ValidationError:
        return None


def _files(folder: Path) -> dict[str, FileFacts]:
    """What a stage has written, once that is on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync(path)
    return {path.relative_to(folder).as_posix(): facts_of_file(path) for path in paths}


def _remove(path: Path) -> None:
    """Remove a folder, or what is in the place of one. Links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(place: Path) -> None:
    """Remove what killed processes left of other keys; a folder whose lock is held is at work."""
    for draft in place.glob(".*.tmp"):
        if file := _lock(place / f"{draft.stem}.lock", wait=False):
            with file:
                _remove(draft)


def _lock(path: Path, *, wait: bool) -> BinaryIO | None:
    """A file that is locked until it is closed; None where another has it and we do not wait."""
    import fcntl  # not on Windows, where preflight refuses

    try:
        file = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            file.close()
            raise
    except BlockingIOError:
        return None
    except OSError as error:  # some network disks have no locks
        raise _unusable(path, error) from None
    return file


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be used: {error.strerror or error}",
        "set HASTEN_CACHE to a folder of yours on a local disk",
    )
