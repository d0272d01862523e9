"""Whether a model fits into memory, before any of it is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hasten.errors import UnsupportedError
from hasten.memory import free_memory
from hasten.units import format_bytes

__all__ = ["check_fits", "converted_bytes"]

FILES = ("diffusion_pytorch_model", "model")  # names of a component's weights, as libraries save
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # what safetensors calls them
LONGEST_HEADER = 10**8  # bytes, by the format


def check_fits(model: str, dtype: torch.dtype, needed: Callable[[torch.dtype], int]) -> None:
    """UnsupportedError where loading a model in this dtype takes more memory than is free.

    needed: bytes that loading takes in a dtype, at the least.
    """
    free, bytes_needed = free_memory(), needed(dtype)
    if free is None or bytes_needed <= free:
        return
    smaller = ""
    if dtype != torch.bfloat16 and (halves := needed(torch.bfloat16)) <= free:
        smaller = f", or --dtype bfloat16, which takes {format_bytes(halves)}"
    raise UnsupportedError(
        f"{model}: loading it in {str(dtype).removeprefix('torch.')} takes "
        f"{format_bytes(bytes_needed)} of memory, and {format_bytes(free)} are free here",
        f"use a machine with more memory{smaller}",
    )


def converted_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Memory that loading the pipeline in a folder takes: that of weights which are stored in
    another dtype. The others are mapped from their files and take none. What cannot be read or is
    not there counts nothing."""
    return sum(
        numel * dtype.itemsize
        for file in _weight_files(folder)
        for stored, numel in _tensors(file)
        if FLOATS.get(stored, dtype) != dtype
    )


def _weight_files(folder: Path) -> Iterator[Path]:
    for name, value in _read(folder / "model_index.json").items():
        if isinstance(value, list):  # a component, by its library and class
            for stem in FILES:
                whole = folder / name / f"{stem}.safetensors"
                parts = (folder / name).glob(f"{stem}-*-of-*.safetensors")
                yield from [whole] if whole.is_file() else parts


def _tensors(file: Path) -> list[tuple[str, int]]:
    """Dtype and number of values of each tensor, by the header of a safetensors file."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, LONGEST_HEADER)))
        header.pop("__metadata__", None)
        return [(entry["dtype"], math.prod(entry["shape"])) for entry in header.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # loading says what is wrong
        return []


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
