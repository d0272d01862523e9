"""The files of a model: whether their weights fit into memory, and each where it belongs.

The libraries fill missing tensors at random and warn. A text encoder that was renamed somewhere on
its way then draws other pictures, so here it is an error.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hasten.errors import ModelError, UnsupportedError
from hasten.memory import format_bytes
from hasten.progress import bar as progress_bar
from hasten.sealed import parse_json

FILES = ("diffusion_pytorch_model", "model")  # names of a component's weights, as libraries save
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # what safetensors calls them
LARGEST_NUMBER = 10**9  # in the config of a component
LIBRARIES = ("diffusers", "transformers")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    "pickles can run code when they are loaded, so hasten loads none; where you trust this one, "
    "convert it: DiffusionPipeline.from_pretrained(MODEL).save_pretrained(FOLDER), then "
    "--model FOLDER"
)


def check_fits(
    model: str, dtype: torch.dtype, needed: Callable[[torch.dtype], int], free: int | None
) -> None:
    """UnsupportedError where loading a model in this dtype takes more memory than is free.

    needed: bytes that loading takes in a dtype, at the least.
    free: bytes; None where they are not known.
    """
    bytes_needed = needed(dtype)
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
    for name, value in _read_json(folder / "model_index.json").items():
        if isinstance(value, list):  # a component, by its library and class
            for stem in FILES:
                whole = folder / name / f"{stem}.safetensors"
                parts = (folder / name).glob(f"{stem}-*-of-*.safetensors")
                yield from [whole] if whole.is_file() else parts


def _tensors(file: Path) -> list[tuple[str, int]]:
    """Dtype and number of values of each tensor, by the header of a safetensors file."""
    try:
        with safe_open(file, "pt") as opened:
            parts = [opened.get_slice(name) for name in opened.offset_keys()]
            return [(part.get_dtype(), math.prod(part.get_shape())) for part in parts]
    except (OSError, SafetensorError):  # loading says what is wrong
        return []


def load_components(
    model: str, folder: Path, dtype: torch.dtype, *, bar: bool = False
) -> dict[str, Any]:
    """The Diffusers and Transformers models of a pipeline folder, by their names in its index.

    Args:
        model: What the user called it, for messages.
        folder: Where `model_index.json` is.
        dtype: Of the weights in memory.
        bar: Show a bar of the components, where anybody can see one.

    Raises:
        ModelError: A component has pickles for weights; or tensors that are missing, unexpected or
            of another shape. Tied weights and what a library ignores on purpose are neither.
    """
    components: dict[str, Any] = {}
    faults: list[str] = []
    kinds = _kinds(folder)
    for name in kinds:
        _check_safetensors(model, folder / name)
        _check_config(model, folder / name)
    with progress_bar("loading", len(kinds), wanted=bar) as line:
        for name, kind in kinds.items():
            components[name], found = _load(kind, folder / name, dtype)
            faults += [f"{model}: {name} {fault}" for fault in found]
            line.update()
    if faults:
        raise ModelError(
            faults,
            "download or convert the model again; its files and config.json do not belong together",
        )
    return components


def _kinds(folder: Path) -> dict[str, Any]:
    """The class of each component that has weights, where it is one of the two libraries'."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    kinds = {}
    for name, value in _read_json(folder / "model_index.json").items():
        match value:
            case [str(library), str(kind)] if library in LIBRARIES and name.isidentifier():
                found = getattr(importlib.import_module(library), kind, None)
                if isinstance(found, type) and issubclass(found, ModelMixin | PreTrainedModel):
                    kinds[name] = found
    return kinds


def _check_safetensors(model: str, folder: Path) -> None:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = [file.name for file in files if file.suffix in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(f"{model}: {folder.name} has its weights in {pickles[0]}", CONVERT)


def _check_config(model: str, folder: Path) -> None:
    """Refuse numbers that no model has: of 10**30 layers, the libraries would try to make each."""
    for name, value in _read_json(folder / "config.json").items():
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise ModelError(
                f"{model}: {folder.name}/config.json: {name} is {value:.0e}",
                "download the model again",
            )


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """One component, and what is wrong with its tensors."""
    from transformers import PreTrainedModel

    # Diffusers names the tensor itself; Transformers refers to a log that nobody may see.
    report = {"ignore_mismatched_sizes": True} if issubclass(kind, PreTrainedModel) else {}
    module, info = kind.from_pretrained(
        str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **report
    )
    if "quantization_config" in _read_json(folder / "config.json"):
        return module, []  # its codes have names of their own
    buffers = {name for name, _ in module.named_buffers()}  # made, not loaded: position_ids
    shapes = {entry[0] for entry in info["mismatched_keys"]}
    faults = [
        _fault(set(info["missing_keys"]) - shapes, "without weights in its files"),
        _fault(
            set(info["unexpected_keys"]) - buffers,
            f"too many for {kind.__name__} in its files",
        ),
        _fault(shapes, "of another shape in its files"),
    ]
    return module, [fault for fault in faults if fault]


def _fault(names: Collection[str], what: str) -> str:
    count = len(names)
    if not count:
        return ""
    return f"has {count} {'tensor' if count == 1 else 'tensors'} {what}, first {min(names)}"


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where it cannot be read or holds another value."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
