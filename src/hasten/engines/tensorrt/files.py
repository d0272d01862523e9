"""The files of an export: their names, their location and their integrity.

Engines are too large to hash at every start, so the sha256 of a large file is cached while its
inode, size and times are unchanged. Does not import torch.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from hasten.atomic import write_text
from hasten.errors import InputError
from hasten.sealed import DamagedError, seal, unseal

GRAPH, DATA = "model.onnx", "model.onnx.data"  # the second holds the weights of the first
ENGINE, AMAX = "engine.plan", "amax.safetensors"
RUNTIME_CACHE = "runtime.cache"  # the engine as compiled for the GPU that ran it

WORTH_IT = 2**20  # bytes: smaller files are hashed faster than looked up
TICK, COARSE_TICK = 0.05, 2.5  # seconds: two changes within a tick may leave the same time
LARGEST_RECORD = 2**24  # bytes of the largest JSON file that hasten reads back


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Base class of records that are written to files and read back."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileFacts(Record):
    """Size and sha256 (hexadecimal) of a file."""

    bytes: NonNegativeInt
    sha256: Sha256


def default_root() -> Path:
    """$HASTEN_CACHE/tensorrt, or ~/.cache/hasten/tensorrt.

    Raises:
        InputError: There is no home directory.
    """
    if chosen := os.environ.get("HASTEN_CACHE"):
        return Path(chosen) / "tensorrt"
    try:
        return Path.home() / ".cache" / "hasten" / "tensorrt"
    except RuntimeError:
        raise InputError(
            "there is no home directory to store exports in",
            "set HASTEN_CACHE to a writable folder",
        ) from None


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder; hard links count once."""
    sizes: dict[int, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it has been removed
                facts = os.lstat(os.path.join(place, name))
                sizes[facts.st_ino] = facts.st_size
    return sum(sizes.values())


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """Read a regular file without following links or blocking.

    Args:
        path: The file.
        limit: The maximum size in bytes; larger files are not read.

    Raises:
        DamagedError: The path is a link, a device or a folder, or the file is larger than `limit`.
        OSError: The file cannot be read.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise DamagedError("it is not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise DamagedError("it is not a regular file")
        if limit is not None and facts.st_size > limit:
            raise DamagedError(f"it has {facts.st_size} bytes, more than hasten ever writes")
        return file.read(facts.st_size)


def read_sealed(path: Path, **identity: Any) -> dict[str, Any] | None:
    """The content of a sealed record; None if it is damaged or has another `identity`."""
    try:
        content = unseal(read_regular(path, LARGEST_RECORD))
    except (OSError, ValueError):
        return None
    same = all(content.pop(name, None) == value for name, value in identity.items())
    return content if same else None


def write_sealed(path: Path, content: Mapping[str, Any], **identity: Any) -> None:
    """Write a record for `read_sealed`; `identity` identifies the subject of the record."""
    write_text(path, seal({**content, **identity}, indent=1))


def damaged_files(
    folder: Path, files: Mapping[str, FileFacts], *, read: bool = True
) -> dict[str, str]:
    """Check the files in a folder.

    No files outside the folder are opened, nor files whose size is wrong.

    Args:
        folder: The folder of the files.
        files: The expected size and sha256 of each file, by its path in the folder.
        read: Whether to compare the contents, not only the sizes.

    Returns:
        The problems by file; empty if all files are as expected.
    """
    faults = {name: _fault(folder, name, facts, read) for name, facts in files.items()}
    return {name: fault for name, fault in faults.items() if fault is not None}


def _fault(folder: Path, name: str, expected: FileFacts, read: bool) -> str | None:
    path = folder / name
    outside = os.path.isabs(name) or ".." in Path(name).parts
    try:
        if outside or path.parent.resolve() != (folder.resolve() / name).parent:
            return "not a file within the folder"
        facts = os.lstat(path)
        if not stat.S_ISREG(facts.st_mode):
            return "not a regular file"
        if facts.st_size != expected.bytes:
            return f"damaged ({facts.st_size} bytes instead of {expected.bytes})"
        return "damaged" if read and facts_of_file(path) != expected else None
    except FileNotFoundError:
        return "missing"
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, or a NUL
        return f"unreadable ({getattr(error, 'strerror', None) or error})"


def facts_of_file(path: Path) -> FileFacts:
    """Compute the size and sha256 of a file.

    The file is read, unless it is large and a cached sha256 exists for its inode, size and times.
    """
    before = _settled(path)
    with suppress(InputError):  # there is no folder for the cache
        if note := read_sealed(_note_path(path), identity=_identity(before)):
            return FileFacts(bytes=before.st_size, sha256=note["sha256sum"])
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    facts = FileFacts(bytes=before.st_size, sha256=sha256)
    if _identity(os.stat(path)) == _identity(before):
        _note(path, before, facts)
    return facts


def note_facts(path: Path, facts: FileFacts) -> None:
    """Cache the facts of a file that was just written or moved, for `facts_of_file`."""
    with suppress(OSError):  # it has been removed
        if (now := _settled(path)).st_size == facts.bytes:
            _note(path, now, facts)


def _identity(now: os.stat_result) -> list[int]:
    return [now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]


def _settled(path: Path) -> os.stat_result:
    """The state of a file; for a large one, after a wait that makes later changes detectable."""
    now = os.stat(path)
    if now.st_size >= WORTH_IT and (wait := TICK - _age(now)) > 0:
        time.sleep(min(wait, TICK))
        now = os.stat(path)
    return now


def _age(now: os.stat_result) -> float:
    return time.time() - max(now.st_mtime, now.st_ctime)


def _note(path: Path, now: os.stat_result, facts: FileFacts) -> None:
    whole_seconds = now.st_mtime_ns % 10**9 == 0  # the time resolution of some file systems
    tick = COARSE_TICK if whole_seconds else TICK
    if now.st_size < WORTH_IT or _age(now) < tick:
        return
    with suppress(OSError, InputError):  # the file will be read again
        note = _note_path(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(note, {"sha256sum": facts.sha256}, identity=_identity(now))


def _note_path(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return default_root() / "hashes" / f"{name}.json"
