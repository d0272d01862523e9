"""The files of a model: checks of memory and of the tensors, and loading of the components.

The libraries initialise missing tensors at random and only warn. A text encoder with renamed
tensors would then produce other images, so here it is an error.
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

FILES = ("diffusion_pytorch_model", "model")  # the libraries' names of weight files
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # by their names in safetensors
LARGEST_NUMBER = 10**9  # in the config of a component
LIBRARIES = ("diffusers", "transformers")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    "hasten does not load pickles because they can run code; if you trust this one, convert it: "
    "DiffusionPipeline.from_pretrained(MODEL).save_pretrained(FOLDER), then --model FOLDER"
)


def check_fits(
    model: str, dtype: torch.dtype, needed: Callable[[torch.dtype], int], free: int | None
) -> None:
    """Check that a model fits into free memory.

    Args:
        model: The model's name in messages.
        dtype: The dtype to load it in.
        needed: Returns the minimum number of bytes that loading needs in a dtype.
        free: Free memory in bytes; None if unknown.

    Raises:
        UnsupportedError: Loading needs more memory than is free.
    """
    bytes_needed = needed(dtype)
    if free is None or bytes_needed <= free:
        return
    smaller = ""
    if dtype != torch.bfloat16 and (halves := needed(torch.bfloat16)) <= free:
        smaller = f", or --dtype bfloat16, which takes {format_bytes(halves)}"
    raise UnsupportedError(
        f"{model}: loading it in {str(dtype).removeprefix('torch.')} takes "
        f"{format_bytes(bytes_needed)} of memory, and {format_bytes(free)} are free",
        f"use a machine with more memory{smaller}",
    )


def converted_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes needed to load the pipeline in a folder.

    Only weights that are stored in another dtype count; all others are memory-mapped. Missing or
    unreadable files count as zero.
    """
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
                single = folder / name / f"{stem}.safetensors"
                parts = (folder / name).glob(f"{stem}-*-of-*.safetensors")
                yield from [single] if single.is_file() else parts


def _tensors(file: Path) -> list[tuple[str, int]]:
    """Dtype and number of values of each tensor, from the header of a safetensors file."""
    try:
        with safe_open(file, "pt") as opened:
            parts = [opened.get_slice(name) for name in opened.offset_keys()]
            return [(part.get_dtype(), math.prod(part.get_shape())) for part in parts]
    except (OSError, SafetensorError):  # loading raises the error
        return []


def load_components(
    model: str, folder: Path, dtype: torch.dtype, *, bar: bool = False
) -> dict[str, Any]:
    """Load the Diffusers and Transformers models of a pipeline folder.

    Args:
        model: The model's name in messages.
        folder: The folder of `model_index.json`.
        dtype: The dtype of the weights in memory.
        bar: Whether to show a progress bar of the components.

    Returns:
        The models by their names in the index.

    Raises:
        ModelError: A component has its weights in pickles, or has missing or unexpected tensors or
            tensors of another shape. Tied weights and tensors that the library ignores are allowed.
    """
    components: dict[str, Any] = {}
    faults: list[str] = []
    kinds = _kinds(folder)
    for name in kinds:
        _check_safetensors(model, folder / name)
        _check_config(model, folder / name)
    with progress_bar("loading", len(kinds), wanted=bar) as line:
        for name, kind in kinds.items():
            components[name], problems = _load(kind, folder / name, dtype)
            faults += [f"{model}: {name} {fault}" for fault in problems]
            line.update()
    if faults:
        raise ModelError(
            faults,
            "download or convert the model again; its files do not match its config.json",
        )
    return components


def _kinds(folder: Path) -> dict[str, Any]:
    """The classes of the components with weights that belong to Diffusers or Transformers."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    kinds = {}
    for name, value in _read_json(folder / "model_index.json").items():
        match value:
            case [str(library), str(kind)] if library in LIBRARIES and name.isidentifier():
                cls = getattr(importlib.import_module(library), kind, None)
                if isinstance(cls, type) and issubclass(cls, ModelMixin | PreTrainedModel):
                    kinds[name] = cls
    return kinds


def _check_safetensors(model: str, folder: Path) -> None:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = [file.name for file in files if file.suffix in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(f"{model}: {folder.name} has its weights in {pickles[0]}", CONVERT)


def _check_config(model: str, folder: Path) -> None:
    """Reject implausible numbers: the libraries would try to create 10**30 layers."""
    for name, value in _read_json(folder / "config.json").items():
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise ModelError(
                f"{model}: {folder.name}/config.json: {name} is {value:.0e}",
                "download the model again",
            )


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Load one component; also return the problems of its tensors."""
    from transformers import PreTrainedModel

    # Diffusers' error names the tensor; Transformers only refers to a log.
    report = {"ignore_mismatched_sizes": True} if issubclass(kind, PreTrainedModel) else {}
    module, info = kind.from_pretrained(
        str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **report
    )
    if "quantization_config" in _read_json(folder / "config.json"):
        return module, []  # its codes have other names
    buffers = {name for name, _ in module.named_buffers()}  # computed, not loaded: position_ids
    shapes = {entry[0] for entry in info["mismatched_keys"]}
    faults = [
        _fault(set(info["missing_keys"]) - shapes, "missing from its files"),
        _fault(
            set(info["unexpected_keys"]) - buffers,
            f"in its files that {kind.__name__} does not have",
        ),
        _fault(shapes, "with another shape in its files"),
    ]
    return module, [fault for fault in faults if fault]


def _fault(names: Collection[str], description: str) -> str:
    count = len(names)
    if not count:
        return ""
    tensors = "tensor" if count == 1 else "tensors"
    return f"has {count} {tensors} {description}; the first is {min(names)}"


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it cannot be read or contains another value."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
