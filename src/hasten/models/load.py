"""Load a pipeline by name: the bundled model, a directory, a hub id, or a bare shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hasten.errors import HastenError, InputError, ModelError
from hasten.machine import machine
from hasten.models.defaults import defaults_for, looks_like_path, model_directory

__all__ = ["has_random_weights", "load_pipeline", "model_notes"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOTES = "_hasten_notes"  # on the transformer of a shape: model: what a reader of figures must know


def load_pipeline(model: str = "tiny", *, device: str = "auto", dtype: str = "auto") -> Any:
    """A Diffusers pipeline on a device, ready to call or to optimise.

    model: `tiny` (bundled), a local directory, a hub id, or `shape:flux.1-dev` (the true
    architecture under random weights, for timing). device and dtype: torch's names; `auto` takes
    the fastest device here and the dtype that suits it.

    Raises ModelError (missing, incomplete, gated, unreadable) or InputError (device, dtype).
    """
    target = _device(device)
    precision = _dtype(dtype, target)
    defaults = defaults_for(model)
    if model.startswith("shape:"):
        from hasten.models.shape import build_shape, shape_named

        return build_shape(shape_named(model.removeprefix("shape:")), target, precision)
    pipe = _from_pretrained(model, precision)
    pipe.default_sample_size = defaults.height // pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(target)


def has_random_weights(pipe: Any) -> bool:
    """True for `shape:` models: their speed means something, their pictures nothing."""
    return bool(model_notes(pipe))


def model_notes(pipe: Any) -> tuple[str, ...]:
    """What a reader of this model's figures must know; empty for trained weights."""
    return tuple(getattr(pipe.transformer, NOTES, ()))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(machine().default_device() if name == "auto" else name)
    except RuntimeError:
        raise InputError(f"{name!r} is not a device", "use cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {name!r}: this torch ({torch.__version__}) sees no CUDA GPU",
            "use --device cpu, or see `hasten doctor`",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r}: there are {torch.cuda.device_count()} GPUs", "count from cuda:0"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = machine().default_dtype(device.type)
    if name not in DTYPES:
        raise InputError(f"{name!r} is not a dtype", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _from_pretrained(model: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    directory = model_directory(model)
    if directory is not None:
        _refuse_incomplete(model, directory)
    elif looks_like_path(model):
        raise _missing(model)
    try:
        return DiffusionPipeline.from_pretrained(str(directory or model), dtype=dtype)
    except HastenError:
        raise
    except Exception as error:
        raise _model_error(model, error) from error


def _refuse_incomplete(model: str, directory: Path) -> None:
    if not directory.is_dir():
        raise _missing(model)
    if not (directory / "model_index.json").is_file():
        raise ModelError(
            f"{directory}: no model_index.json, so it is not a Diffusers pipeline",
            "give the directory that `pipe.save_pretrained(...)` wrote",
        )


def _missing(model: str) -> ModelError:
    return ModelError(
        f"{model}: no such model directory",
        "check the path; a hub id is written owner/name, the bundled model is called tiny",
    )


# Exception class names (huggingface_hub's, safetensors', the network stack's) -> what to do.
_REMEDIES = (
    (
        ("GatedRepoError",),
        "the model is gated",
        "accept its licence on its hub page, then run `hf auth login` or set HF_TOKEN",
    ),
    (
        (
            "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "ProxyError",
            "OfflineModeIsEnabled", "ReadTimeout", "ConnectTimeout", "SSLError",
        ),
        "the hub cannot be reached and the model is not in the local cache",
        "check the network and HF_HUB_OFFLINE, or pass a local directory",
    ),
    (
        ("RepositoryNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"),
        "there is no such pipeline on the hub, or it is private",
        "check the spelling of owner/name; for a private one set HF_TOKEN",
    ),
    (
        ("SafetensorError", "JSONDecodeError", "UnpicklingError"),
        "a file of the model is truncated or corrupt",
        "download or copy it again: compare the sizes of its .safetensors files with the source",
    ),
    (("OutOfMemoryError",), "not enough memory to load it", "add [offload] kind = \"model\""),
)  # fmt: skip


def _model_error(model: str, error: BaseException) -> ModelError:
    """Name the cause of a failed load, looking through the chain of exceptions."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for names, fault, fix in _REMEDIES:
        for link in chain:
            if any(kind.__name__ in names for kind in type(link).__mro__):
                return ModelError(f"{model}: {fault} ({_first_line(link)})", fix)
    return ModelError(
        f"{model}: cannot be loaded: {type(error).__name__}: {_first_line(error)}",
        "try DiffusionPipeline.from_pretrained on it alone; `--debug` shows the traceback",
    )


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text[:200] or type(error).__name__
