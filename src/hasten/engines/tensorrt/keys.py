"""Keys of stages and requests: sha256 of everything that their results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import EngineError
from hasten.machine import version_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


STAGES = 4  # increment it when the output of a stage changes for the same input
LIBRARIES = {
    "calibrate": ("torch", "diffusers", "transformers", "nvidia-modelopt"),
    "export": ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir"),
    "verify": ("torch", "diffusers", "onnx", "onnxruntime"),
    "build": ("tensorrt-rtx-cu13",),
}
MOST_THREADS = 8  # each holds one tensor: up to 94 MB for FLUX.1


def content_key(parts: Mapping[str, Any]) -> str:
    """Hash JSON-serialisable values to 32 hexadecimal digits; tuples count as lists."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def versions(stage: str | None = None) -> dict[str, str | None]:
    """Versions of the libraries that a stage, or any stage, uses; None for missing ones."""
    names = LIBRARIES[stage] if stage else dict.fromkeys(sum(LIBRARIES.values(), ()))
    return {name: version_of(name) for name in names}


def request_key(model: Path | str, request: Mapping[str, Any]) -> str:
    """The key of a request for a model.

    Args:
        model: A directory, identified by the inodes, sizes and times of its files, or a shape.
        request: JSON-serialisable values or paths.
    """
    files: list[Any] = [model]
    if isinstance(model, Path):
        files = [
            (
                path.relative_to(model).as_posix(),
                *(facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns),
            )
            for path in sorted(model.rglob("*"))
            if path.is_file() and (facts := path.stat())
        ]
    plain = json.loads(json.dumps(request, default=str))
    return content_key({"request": plain, "model": files, "stages": STAGES, "versions": versions()})


def weights_digest(model: Any, dtype: torch.dtype | None = None, label: str = "transformer") -> str:
    """Compute a sha256 over the names, shapes and values of all tensors of a model.

    Values are rounded first, as in a graph, so a model and its copy in another dtype have the same
    digest. Several threads each hold one rounded tensor.

    Args:
        model: A torch module.
        dtype: The dtype to round values to; bfloat16 by default.
        label: The model's name in errors.

    Raises:
        EngineError: A tensor has no values.
    """
    import torch

    digest = partial(_digest, dtype=dtype or torch.bfloat16, label=label)
    with ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads())) as threads:
        digests = threads.map(digest, sorted(model.state_dict().items()))
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def pipeline_digest(pipe: Any, weights: str) -> dict[str, Any]:
    """Collect everything that a latent image depends on: weights, tokenizers and configurations.

    Args:
        pipe: A Diffusers pipeline.
        weights: The digest of its transformer, which is slow to compute.
    """
    contents: dict[str, Any] = {"dtype": str(pipe.dtype), "device": pipe.device.type}
    for name, component in sorted(pipe.components.items()):
        if hasattr(component, "state_dict") and name != "vae":
            is_first = name == "transformer"
            contents[name] = weights if is_first else weights_digest(component, label=name)
        if hasattr(component, "get_vocab"):
            contents[name] = _tokenizer(component)
        if hasattr(component, "config"):
            contents[f"{name}.config"] = config_of(component)
    return contents


def config_of(component: Any) -> dict[str, Any]:
    """A configuration as JSON values, without private entries such as path and versions."""
    config = component.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    public = {key: value for key, value in values.items() if not key.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(public, sort_keys=True, default=str))
    return plain


def _tokenizer(component: Any) -> dict[str, Any]:
    words = json.dumps(component.get_vocab(), sort_keys=True).encode()
    return {
        "class": type(component).__name__,
        "longest": component.model_max_length,
        "vocabulary": hashlib.sha256(words).hexdigest(),
    }


def _digest(named: tuple[str, Tensor], dtype: torch.dtype, label: str) -> str:
    import torch

    name, tensor = named
    if tensor.is_meta:
        raise EngineError(
            f"the tensor {name} of the {label} has no values",
            "load the complete model before exporting it, nothing offloaded",
        )
    on_cpu = tensor.detach().cpu()
    rounded = on_cpu.to(dtype) if on_cpu.is_floating_point() else on_cpu
    flat = rounded.contiguous().reshape(-1)
    digest = hashlib.sha256(f"{name}{tuple(tensor.shape)}".encode())
    values: Any = flat.view(torch.uint8).numpy()
    digest.update(values)
    return digest.hexdigest()
