"""The files of an export by name, and how the two of a graph are written: `model.onnx`, and
`model.onnx.data` with its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hasten.errors import EngineError

__all__ = ["AMAX", "DATA", "ENGINE", "GRAPH", "RUNTIME_CACHE", "place", "writing"]

GRAPH, DATA = "model.onnx", "model.onnx.data"
ENGINE, AMAX = "engine.plan", "amax.safetensors"
RUNTIME_CACHE = "runtime.cache"  # what an engine became on the GPU that ran it
PAGE = 4096  # bytes: large values begin at one, so that they can be mapped into memory
WORD = 64  # bytes: small ones begin at a multiple of it


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Both files are there once this is left, or neither. A full disk raises EngineError."""
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
