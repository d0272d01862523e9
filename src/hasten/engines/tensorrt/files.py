"""The files of an export: their names, where they are kept, and whether they are what was written.

Engines are too large to hash at every start, so the sha256 of a large file is remembered while its
inode, size and times stay as they are. No torch.
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

WORTH_IT = 2**20  # bytes: smaller files are read faster than looked up
TICK, COARSE_TICK = 0.05, 2.5  # seconds: two changes within one could leave the same time behind
LARGEST_RECORD = 2**24  # bytes of a JSON file that hasten reads back


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Base of what is written to be read back."""

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
            "there is no home directory to keep exports in",
            "set HASTEN_CACHE to a folder that can be written",
        ) from None


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder; a file with two names counts once."""
    sizes: dict[int, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it was removed meanwhile
                facts = os.lstat(os.path.join(place, name))
                sizes[facts.st_ino] = facts.st_size
    return sum(sizes.values())


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file, which is opened without following a link or waiting.

    Args:
        path: The file.
        limit: The most bytes that it may have; more is not read.

    Raises:
        DamagedError: It is a link, a device or a folder, or larger than `limit`.
        OSError: It cannot be read.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise DamagedError("it is not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise DamagedError("it is not a regular file")
        if limit is not None and facts.st_size > limit:
            raise DamagedError(f"it has {facts.st_size} bytes, more than any that hasten writes")
        return file.read(facts.st_size)


def read_sealed(path: Path, **identity: Any) -> dict[str, Any] | None:
    """The content of a sealed record, or None where it is not what was written under `identity`."""
    try:
        content = unseal(read_regular(path, LARGEST_RECORD))
    except (OSError, ValueError):
        return None
    same = all(content.pop(name, None) == value for name, value in identity.items())
    return content if same else None


def write_sealed(path: Path, content: Mapping[str, Any], **identity: Any) -> None:
    """Write a record that `read_sealed` reads back; `identity` says what it is a record of."""
    write_text(path, seal({**content, **identity}, indent=1))


def damaged_files(
    folder: Path, files: Mapping[str, FileFacts], *, read: bool = True
) -> dict[str, str]:
    """The files that are not in a folder as they were, by name, and what is wrong with each.

    Nothing outside of the folder is opened, and no file whose size is already wrong.

    Args:
        folder: Where the files belong.
        files: What they were when they were written, by their paths in the folder.
        read: Whether to compare their contents too, not their sizes alone.
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
    """Size and sha256 of a file.

    Reads the whole file, except a large one that has been read before and whose inode, size and
    times of change are as they were then.
    """
    before = _settled(path)
    with suppress(InputError):  # there is no cache to note it in
        if note := read_sealed(_note_path(path), identity=_identity(before)):
            return FileFacts(bytes=before.st_size, sha256=note["sha256sum"])
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    facts = FileFacts(bytes=before.st_size, sha256=sha256)
    if _identity(os.stat(path)) == _identity(before):
        _note(path, before, facts)
    return facts


def note_facts(path: Path, facts: FileFacts) -> None:
    """Remember what `facts_of_file` would find, of a file that was just made or moved."""
    with suppress(OSError):  # it has been removed meanwhile
        if (now := _settled(path)).st_size == facts.bytes:
            _note(path, now, facts)


def _identity(now: os.stat_result) -> list[int]:
    return [now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]


def _settled(path: Path) -> os.stat_result:
    """The state of a large file, once a further change is sure to give it another identity."""
    now = os.stat(path)
    if now.st_size >= WORTH_IT and (wait := TICK - _age(now)) > 0:
        time.sleep(min(wait, TICK))
        now = os.stat(path)
    return now


def _age(now: os.stat_result) -> float:
    return time.time() - max(now.st_mtime, now.st_ctime)


def _note(path: Path, now: os.stat_result, facts: FileFacts) -> None:
    whole_seconds = now.st_mtime_ns % 10**9 == 0  # as some disks keep time
    tick = COARSE_TICK if whole_seconds else TICK
    if now.st_size < WORTH_IT or _age(now) < tick:
        return
    with suppress(OSError, InputError):  # it is read again then
        note = _note_path(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(note, {"sha256sum": facts.sha256}, identity=_identity(now))


def _note_path(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return default_root() / "hashes" / f"{name}.json"
