"""sha256 of files, remembered while a file stays what it is: engines are too large to read at every
start. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hasten.atomic import write_text
from hasten.engines.tensorrt.files import default_root, read_object
from hasten.errors import InputError

__all__ = ["FileFacts", "content_key", "facts_of_file", "note_facts"]

WORTH_IT = 2**20  # bytes: smaller files are read faster than looked up
TICK, COARSE_TICK = 0.05, 2.5  # seconds: two changes within one could leave the same time behind


class FileFacts(NamedTuple):
    """Size and sha256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


def facts_of_file(path: Path) -> FileFacts:
    """Reads the whole file, but for a large one that has been read before and whose inode, size
    and times of change are as they were then."""
    before = _settled(path)
    known = _noted(path)
    if known is not None and known.get("identity") == before:
        return FileFacts(known["bytes"], known["sha256"])
    with path.open("rb") as file:
        facts = FileFacts(before["bytes"], hashlib.file_digest(file, "sha256").hexdigest())
    if _identity(path) == before:
        _note(path, before, facts)
    return facts


def note_facts(path: Path, facts: FileFacts) -> None:
    """Let `facts_of_file` know what it would find: of a file that was just made, or moved."""
    with suppress(OSError):  # it has been removed meanwhile
        if (identity := _settled(path))["bytes"] == facts.bytes:
            _note(path, identity, facts)


def content_key(parts: Mapping[str, Any]) -> str:
    """32 hexadecimal digits of values that JSON can hold; tuples count as lists."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _identity(path: Path) -> dict[str, int]:
    found = os.stat(path)
    return {
        "device": found.st_dev,
        "inode": found.st_ino,
        "bytes": found.st_size,
        "modified": found.st_mtime_ns,
        "changed": found.st_ctime_ns,
    }


def _settled(path: Path) -> dict[str, int]:
    """The identity of a large file once a further change is sure to give it another one."""
    found = _identity(path)
    if found["bytes"] >= WORTH_IT and (wait := TICK - _age(found)) > 0:
        time.sleep(min(wait, TICK))
        found = _identity(path)
    return found


def _age(identity: Mapping[str, int]) -> float:
    return time.time() - max(identity["modified"], identity["changed"]) / 1e9


def _note(path: Path, identity: Mapping[str, int], facts: FileFacts) -> None:
    whole_seconds = identity["modified"] % 10**9 == 0  # as some disks keep time
    tick = COARSE_TICK if whole_seconds else TICK
    if identity["bytes"] < WORTH_IT or _age(identity) < tick:
        return
    with suppress(OSError, InputError):  # it is read again then
        note = _place(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps({"identity": identity, **facts._asdict()}))


def _noted(path: Path) -> dict[str, Any] | None:
    try:
        return read_object(_place(path))
    except InputError:  # there is no cache
        return None


def _place(path: Path) -> Path:
    return default_root() / "hashes" / f"{content_key({'path': str(path.resolve())})}.json"
