"""Load a pipeline by name: the bundled model, a directory, a hub id, or a bare shape."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from hasten.errors import HastenError, ModelError, causes
from hasten.log import disable_telemetry, quiet
from hasten.machine import check_dtype, machine
from hasten.memory import free_memory, ran_out
from hasten.models.architecture import shape_named
from hasten.models.checkpoint import CONVERT, check_fits, converted_bytes, load_components
from hasten.models.defaults import check_model, defaults_for, kept_snapshot, model_directory

NOTES = "_hasten_notes"  # attribute of the transformer of a `shape:` model: its notes


def load_pipeline(
    model: str = "tiny", *, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> Any:
    """Load a Diffusers pipeline.

    Weights are read only from safetensors files, which cannot run code.

    Args:
        model: `tiny` (bundled), a local directory, a hub id, or `shape:flux.1-dev` (the original
            architecture with random weights, for timing).
        device: A torch device; `auto` selects the first CUDA device, else the CPU.
        dtype: A torch dtype or its name; `auto` selects float32 on the CPU, and bfloat16 or float16
            on a GPU.

    Returns:
        The pipeline on the device.

    Raises:
        ModelError: The model is missing, incomplete, gated or unreadable, or has missing or
            unexpected tensors or tensors of another shape.
        InputError: The shape, device or dtype is unknown.
        UnsupportedError: The model needs more memory than is free. Nothing was loaded.
    """
    disable_telemetry()
    target, precision = check_loadable(model, device, dtype)
    defaults = defaults_for(model)
    try:
        if model.startswith("shape:"):
            from hasten.models.random_weights import build_shape

            return build_shape(shape_named(model.removeprefix("shape:")), target, precision)
        pipe = _from_pretrained(model, precision)
        pipe.default_sample_size = defaults.height // pipe.vae_scale_factor
        return pipe.to(target)
    except HastenError:
        raise
    except Exception as error:
        raise _model_error(model, error) from error


def check_loadable(
    model: str, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[torch.device, torch.dtype]:
    """Check what can be checked before a load. Raises the same errors as `load_pipeline`.

    Returns:
        The device and the dtype.
    """
    check_model(model)
    dtype = str(dtype).removeprefix("torch.")
    check_dtype(dtype)
    here = machine()
    target = torch.device(here.usable_device(device))
    precision: torch.dtype = getattr(
        torch, here.default_dtype(str(target)) if dtype == "auto" else dtype
    )
    gpu = here.gpu(str(target))
    if model.startswith("shape:"):
        from hasten.models.random_weights import shape_bytes

        shape = shape_named(model.removeprefix("shape:"))
        free = gpu.memory_bytes if gpu else free_memory()  # where the weights are made
        check_fits(model, precision, lambda dtype: shape_bytes(shape, dtype), free)
    elif folder := model_directory(model) or kept_snapshot(model):
        check_fits(model, precision, lambda dtype: converted_bytes(folder, dtype), free_memory())
    return target, precision


def has_random_weights(pipe: Any) -> bool:
    """Whether the weights are random (`shape:` models): only the speed is meaningful."""
    return bool(model_notes(pipe))


def model_notes(pipe: Any) -> tuple[str, ...]:
    """Notes that belong with every measurement of a model; empty for trained weights."""
    return tuple(getattr(pipe.transformer, NOTES, ()))


def _from_pretrained(model: str, dtype: torch.dtype) -> Any:
    """Load a pipeline from safetensors files only and check its tensors."""
    with _calm_libraries():
        from diffusers import DiffusionPipeline
    own = model_directory(model)
    folder = own or Path(DiffusionPipeline.download(model, use_safetensors=True))
    with _calm_libraries() as wants_bar:
        components = load_components(model, folder, dtype, bar=wants_bar)
        pipe = DiffusionPipeline.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, **components
        )
    pipe.register_to_config(_name_or_path=str(own or model))
    return pipe


@contextmanager
def _calm_libraries() -> Iterator[bool]:
    """Silence the libraries' bars and warnings; yields whether their bars were enabled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers.utils.logging
        import transformers.utils.logging
    libraries = diffusers.utils.logging, transformers.utils.logging
    with ExitStack() as stack:
        stack.enter_context(quiet())  # first in, last out
        wanted = [library.is_progress_bar_enabled() for library in libraries]
        for library in compress(libraries, wanted):
            library.disable_progress_bar()
            stack.callback(library.enable_progress_bar)
        yield all(wanted)


# Diffusers' message for a repository that has only pickles.
_WITHOUT_SAFETENSORS = "Could not find the necessary `safetensors` weights"

# Exception class names (huggingface_hub's, safetensors', the network stack's) -> fault and fix.
_REMEDIES = (
    (
        ("GatedRepoError",),
        "the model is gated",
        "accept its licence on its hub page; then run `hf auth login` or set HF_TOKEN",
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
        ("SafetensorError", "JSONDecodeError", "UnicodeDecodeError", "RecursionError"),
        "a file of the model is truncated or corrupt",
        "download or copy it again: compare the sizes of its .safetensors files with the source",
    ),
)  # fmt: skip


def _model_error(model: str, error: BaseException) -> ModelError:
    """The error for a failed load, from the chain of exceptions."""
    if ran_out(error):
        return ModelError(
            f"{model}: not enough memory to load it",
            "free some memory, raise its limit (ulimit, container), or use --dtype bfloat16",
        )
    if any(_WITHOUT_SAFETENSORS in str(link) for link in causes(error)):
        return ModelError(f"{model}: a component has no weights in .safetensors files", CONVERT)
    for names, fault, fix in _REMEDIES:
        for link in causes(error):
            if any(kind.__name__ in names for kind in type(link).__mro__):
                return ModelError(f"{model}: {fault} ({_first_line(link)})", fix)
    return ModelError(
        f"{model}: cannot be loaded: {type(error).__name__}: {_first_line(error)}",
        "try DiffusionPipeline.from_pretrained on it alone; `--debug` shows the traceback",
    )


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text[:200] or type(error).__name__
