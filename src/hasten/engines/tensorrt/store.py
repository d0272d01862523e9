"""Finished stages by what they were made from, in a folder, so that no work is done twice.

ROOT/STAGE/KEY/          what a stage made; stage.json has its files' sizes and sha256
ROOT/STAGE/.KEY.tmp/     a stage at work; left behind only by a process that was killed
ROOT/STAGE/.KEY.lock     held while one process makes or checks it; the others wait
ROOT/finished/KEY.json   what a request led to, see `remember`
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hasten.atomic import sync, write_text
from hasten.engines.tensorrt.files import default_root, read_object
from hasten.engines.tensorrt.hashes import FileFacts, facts_of_file, note_facts
from hasten.errors import EngineError, HastenError, InputError

__all__ = ["FIX_SPACE", "Done", "Store", "Tell", "out_of_space"]

Tell = Callable[[str], None]
"""Takes one line for whoever waits."""

RECORD = "stage.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FIX_SPACE = (
    "free some disk space, or set HASTEN_CACHE to a folder on another disk; then run it again: "
    "finished stages are kept"
)


class Done(NamedTuple):
    """A finished stage: its folder, what `make` said of it, whether it was there already, how many
    seconds making it took, then or now, and its files by their names in the folder."""

    folder: Path
    facts: dict[str, Any]
    cached: bool
    seconds: float
    files: dict[str, FileFacts]


class Store:
    """Stages below `root`; `tell` hears of damaged files and of waiting for another process."""

    def __init__(self, root: Path | None = None, tell: Tell = lambda _: None) -> None:
        self.root = root or default_root()
        self.tell = tell

    def stage(self, name: str, key: str, make: Callable[[Path], dict[str, Any]]) -> Done:
        """What `make` writes into the empty folder it is given, made once for each key.

        make returns facts, values that JSON keeps as they are. The folder gets its name when it is
        whole; when it is found again its files are compared with their sha256, and it is made anew
        where one differs. Raises InputError where the store cannot be used, EngineError where the
        disk is full; whatever `make` raises leaves nothing behind.
        """
        place = self._place(name)
        with self.locked(name, key):
            shutil.rmtree(place / f".{key}.tmp", ignore_errors=True)
            _remove_leftovers(place)
            return self._found(place / key) or self._made(place, key, make)

    @contextmanager
    def locked(self, name: str, key: str) -> Iterator[None]:
        """One process at a time; the system frees the lock of one that was killed."""
        path = self._place(name) / f".{key}.lock"
        with _lockable(path) as file:
            if not _lock(file, wait=False):
                self.tell(f"{name}: another process is at it, waiting for that to end")
                _lock(file, wait=True)
            yield

    def remember(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep a small value, JSON, under a key."""
        write_text(self._place("finished") / f"{key}.json", json.dumps(value, indent=1))

    def recall(self, key: str) -> dict[str, Any] | None:
        """What was kept; None where there is none that can be read."""
        return read_object(self.root / "finished" / f"{key}.json")

    def _place(self, name: str) -> Path:
        place = self.root / name
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(place, error) from None
        return place

    def _found(self, folder: Path) -> Done | None:
        if not folder.exists():
            return None
        record = read_object(folder / RECORD)
        fault = _damage(folder, record)
        if record is not None and fault is None:
            return _done(folder, record, cached=True)
        self.tell(f"{folder.parent.name}: {fault}, so it is made again")
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise _unusable(folder, error) from None
        return None

    def _made(self, place: Path, key: str, make: Callable[[Path], dict[str, Any]]) -> Done:
        draft = place / f".{key}.tmp"
        start = time.perf_counter()
        try:
            draft.mkdir()
            facts = make(draft)
            seconds = round(time.perf_counter() - start, 3)
            record = _write_record(draft, facts, seconds)
            os.replace(draft, place / key)
            done = _done(place / key, record, cached=False)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            if not isinstance(error, HastenError) and out_of_space(error):
                fault = f"{place.name}: no space left for its files in {self.root}"
                raise EngineError(fault, FIX_SPACE) from error
            raise
        for name, known in done.files.items():
            note_facts(done.folder / name, known)
        return done


def out_of_space(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on files is full; not every library says it by errno."""
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    return any(f"(os error {number})" in str(error) for number in NO_SPACE)


def _done(folder: Path, record: dict[str, Any], *, cached: bool) -> Done:
    files = {name: FileFacts(**facts) for name, facts in record["files"].items()}
    return Done(folder, record["facts"], cached, record["seconds"], files)


def _write_record(folder: Path, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = facts_of_file(path)._asdict()
    record = {"facts": facts, "seconds": seconds, "files": files}
    write_text(folder / RECORD, json.dumps(record, indent=1))
    return record


def _damage(folder: Path, record: dict[str, Any] | None) -> str | None:
    """What is wrong with a stage's files; None where nothing is."""
    if record is None or not {"facts", "seconds", "files"} <= record.keys():
        return f"{RECORD} cannot be read"
    for name, facts in record["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            same = facts_of_file(path)._asdict() == facts
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if not same:
            return f"{name} is damaged"
    return None


def _remove_leftovers(place: Path) -> None:
    """What killed processes left of other keys; a folder whose lock is held is at work."""
    for draft in place.glob(".*.tmp"):
        with _lockable(place / f"{draft.stem}.lock") as file:
            if draft.is_dir() and _lock(file, wait=False):
                shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _lockable(path: Path) -> Iterator[Any]:
    try:
        file = path.open("a")
    except OSError as error:
        raise _unusable(path, error) from None
    with file:
        yield file


def _lock(file: Any, *, wait: bool) -> bool:
    """Take the lock of an open file; False where another has it and we do not wait."""
    import fcntl  # not on Windows, where preflight refuses

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:  # some network disks know no locks
        raise _unusable(Path(file.name), error) from None
    return True


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be used: {error.strerror or error}",
        "set HASTEN_CACHE to a folder of yours on a local disk",
    )
