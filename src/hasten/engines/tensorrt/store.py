"""Stores the results of stages in a folder under a key of their inputs.

ROOT/STAGE/KEY/          the files of a stage; the sealed stage.json has their sizes and sha256
ROOT/STAGE/.KEY.tmp/     a running stage; left behind only by a process that was killed
ROOT/STAGE/.KEY.lock     held while a process runs or checks the stage; other processes wait
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
        facts: The return value of `make`.
        seconds: The time that the stage took when it ran.
        files: Size and sha256 of its files, by their names in the folder.
        folder: The folder of its files.
        cached: Whether an earlier result was reused.
    """

    facts: dict[str, Any]
    seconds: float
    files: dict[str, FileFacts]
    folder: Path = Field(exclude=True)
    cached: bool = Field(exclude=True)


class StageStore:
    """The stages below `root`. Damaged files and waits for other processes are logged.

    Args:
        root: The folder; None for the default cache.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def stage(self, name: str, key: str, make: Callable[[Path], dict[str, Any]]) -> Done:
        """Run a stage, or reuse its stored result.

        A stored result is checked against its sha256 and is computed again if a file differs. A
        folder gets its final name when it is complete.

        Args:
            name: The stage's name.
            key: A key of everything that the result depends on, see `content_key`.
            make: Writes files into the empty folder that it gets, and returns facts as JSON values.
                If it raises, the folder is removed.

        Returns:
            The finished stage.

        Raises:
            InputError: The store cannot be used.
            EngineError: The disk is full.
        """
        place = self._place(name)
        with self.locked(name, key):
            try:
                _remove(place / f".{key}.tmp")
                _remove_leftovers(place)
                return self._reused(place / key) or self._run(place, key, make)
            except Exception as error:
                if store_error := self._store_error(place, error):
                    raise store_error from error
                raise

    @contextmanager
    def locked(self, name: str, key: str) -> Iterator[None]:
        """Lock a key for one process; the system frees the locks of killed processes."""
        path = self._place(name) / f".{key}.lock"
        file = _lock(path, wait=False)
        if file is None:
            logger.info(f"{name}: waiting for another process that runs this stage")
            file = _lock(path, wait=True)
        assert file is not None  # wait=True
        with file:
            yield

    def _place(self, name: str) -> Path:
        place = self.root / name
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(place, error) from None
        return place

    def _store_error(self, place: Path, error: Exception) -> HastenError | None:
        """The error to raise if a stage failed because of the store's disk or folders."""
        if out_of_space(error):
            fault = f"{place.name}: no space left for its files in {self.root}"
            return EngineError(fault, FIX_SPACE)
        if not place.is_dir():
            return EngineError(f"{place}: removed while a stage was running", "run it again")
        if isinstance(error, OSError) and str(error.filename).startswith(str(self.root)):
            return _unusable(place, error)
        return None

    def _reused(self, folder: Path) -> Done | None:
        if not os.path.lexists(folder):
            return None
        if folder.is_symlink() or not folder.is_dir():
            fault = "it is not a folder"
        elif (done := _read_done(folder)) is None:
            fault = f"{RECORD} is damaged"
        elif faults := damaged_files(folder, done.files):
            fault = " is ".join(next(iter(faults.items())))
        else:
            return done
        logger.info(f"{folder.parent.name}: {fault}; running the stage again")
        _remove(folder)
        return None

    def _run(self, place: Path, key: str, make: Callable[[Path], dict[str, Any]]) -> Done:
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
        for name, file_facts in files.items():
            note_facts(folder / name, file_facts)
        return done


def out_of_space(error: BaseException) -> bool:
    """Whether an error is about a full disk, quota or file limit; some have it only in the text."""
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    return any(f"(os error {number})" in str(error) for number in NO_SPACE)


def _read_done(folder: Path) -> Done | None:
    """Read the record of a stage; None if it is damaged or belongs to another stage."""
    record = read_sealed(folder / RECORD, stage=folder.parent.name, key=folder.name)
    try:
        return Done.model_validate({**(record or {}), "folder": folder, "cached": True})
    except ValidationError:
        return None


def _files(folder: Path) -> dict[str, FileFacts]:
    """The files that a stage has written, after they are synced to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync(path)
    return {path.relative_to(folder).as_posix(): facts_of_file(path) for path in paths}


def _remove(path: Path) -> None:
    """Remove a folder, or a file in place of one. Links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(place: Path) -> None:
    """Remove the folders that killed processes left behind; a held lock marks a running stage."""
    for draft in place.glob(".*.tmp"):
        if file := _lock(place / f"{draft.stem}.lock", wait=False):
            with file:
                _remove(draft)


def _lock(path: Path, *, wait: bool) -> BinaryIO | None:
    """A file that is locked until it is closed; None if another process holds it and not `wait`."""
    import fcntl  # not available on Windows, which preflight rejects

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
        "set HASTEN_CACHE to a writable folder on a local disk",
    )
