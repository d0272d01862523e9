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

from hasten.engines.tensorrt.files import default_root, read_object, write_text

__all__ = ["FileFacts", "content_key", "facts_of_file"]

WORTH_IT = 2**20  # bytes: smaller files are read faster than looked up
SETTLED = 2.0  # seconds: a file changed later than that could change again within one tick


class FileFacts(NamedTuple):
    """Size and sha256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


def facts_of_file(path: Path) -> FileFacts:
    """Reads the whole file, but for a large one that has been read before and whose inode, size
    and times of change are as they were then."""
    before = _identity(path)
    note = default_root() / "hashes" / f"{content_key({'path': str(path.resolve())})}.json"
    known = read_object(note)
    if known is not None and known.get("identity") == before:
        return FileFacts(known["bytes"], known["sha256"])
    with path.open("rb") as file:
        facts = FileFacts(before["bytes"], hashlib.file_digest(file, "sha256").hexdigest())
    if _worth_it(before) and _identity(path) == before:
        with suppress(OSError):  # it is read again then
            note.parent.mkdir(parents=True, exist_ok=True)
            write_text(note, json.dumps({"identity": before, **facts._asdict()}))
    return facts


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


def _worth_it(identity: Mapping[str, int]) -> bool:
    age = time.time() - max(identity["modified"], identity["changed"]) / 1e9
    return identity["bytes"] >= WORTH_IT and age > SETTLED
