"""The files of an export by name, where they are kept, and how they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from hasten.errors import EngineError, InputError

__all__ = [
    "AMAX",
    "DATA",
    "ENGINE",
    "GRAPH",
    "RUNTIME_CACHE",
    "bytes_below",
    "default_root",
    "place",
    "read_object",
    "writing",
]

GRAPH, DATA = "model.onnx", "model.onnx.data"  # the second holds the weights of the first
ENGINE, AMAX = "engine.plan", "amax.safetensors"
RUNTIME_CACHE = "runtime.cache"  # what an engine became on the GPU that ran it
PAGE = 4096  # bytes: large values begin at one, so that they can be mapped into memory
WORD = 64  # bytes: small ones begin at a multiple of it


def default_root() -> Path:
    """$HASTEN_CACHE/tensorrt, or ~/.cache/hasten/tensorrt. InputError where there is no home."""
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
    """Of all files in a folder and those in it; a file of two names counts once."""
    found: dict[int, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it was removed meanwhile
                facts = os.lstat(os.path.join(place, name))
                found[facts.st_ino] = facts.st_size
    return sum(found.values())


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none that can be read."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Both files of a graph are there once this is left, or neither. A full disk raises
    EngineError."""
    try:
        yield
    except BaseException as error:
        for name in (GRAPH, DATA):
            (folder / name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise EngineError(
                f"the graph cannot be written to {folder}: {error.strerror or error}",
                "make room there: a graph takes what its weights take",
            ) from error
        raise


def place(file: BinaryIO, length: int) -> int:
    """Where a value of so many bytes goes: the file is filled up to there with zeros."""
    step = PAGE if length >= PAGE else WORD
    offset = -(-file.tell() // step) * step
    file.write(b"\0" * (offset - file.tell()))
    return offset
