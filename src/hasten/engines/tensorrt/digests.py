"""What a pipeline is, in sha256: its weights and all that a drawing depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from hasten.errors import EngineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["config_of", "pipeline_digest", "weights_digest"]

MOST_THREADS = 8  # each holds one tensor: 94 MB of FLUX.1's largest


def weights_digest(model: Any, dtype: torch.dtype | None = None, what: str = "transformer") -> str:
    """sha256 over names, shapes and values of all tensors, rounded to `dtype` (bfloat16).

    Rounded, so that a model and its copy in another dtype agree, and because a graph holds no more.
    Several tensors are read at once; each thread holds one of them, rounded. what: the model's name
    in errors.
    """
    import torch

    kept = dtype or torch.bfloat16
    tensors: Mapping[str, Tensor] = model.state_dict()

    def digest(name: str) -> str:
        return _digest(name, tensors[name], kept, what)

    with ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads())) as threads:
        digests = threads.map(digest, sorted(tensors))
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def pipeline_digest(pipe: Any, weights: str) -> dict[str, Any]:
    """All that a drawing depends on: modules by their weights and configuration. weights: those of
    the transformer, which take long to read."""
    found: dict[str, Any] = {"dtype": str(pipe.dtype), "device": pipe.device.type}
    for name, component in sorted(pipe.components.items()):
        if hasattr(component, "state_dict") and name != "vae":
            is_first = name == "transformer"
            found[name] = weights if is_first else weights_digest(component, what=name)
        if hasattr(component, "get_vocab"):
            found[name] = _tokenizer(component)
        if hasattr(component, "config"):
            found[f"{name}.config"] = config_of(component)
    return found


def config_of(component: Any) -> dict[str, Any]:
    """Configuration as JSON values, without what is private: where it was loaded from, versions."""
    config = component.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    public = {key: value for key, value in values.items() if not key.startswith("_")}
    found: dict[str, Any] = json.loads(json.dumps(public, sort_keys=True, default=str))
    return found


def _tokenizer(component: Any) -> dict[str, Any]:
    words = json.dumps(component.get_vocab(), sort_keys=True).encode()
    return {
        "class": type(component).__name__,
        "longest": component.model_max_length,
        "vocabulary": hashlib.sha256(words).hexdigest(),
    }


def _digest(name: str, tensor: Tensor, dtype: torch.dtype, what: str) -> str:
    import torch

    if tensor.is_meta:
        raise EngineError(
            f"the tensor {name} of the {what} has no values",
            "load the whole model before exporting it, nothing offloaded",
        )
    here = tensor.detach().cpu()
    rounded = here.to(dtype) if here.is_floating_point() else here
    flat = rounded.contiguous().reshape(-1)
    digest = hashlib.sha256(f"{name}{tuple(tensor.shape)}".encode())
    values: Any = flat.view(torch.uint8).numpy()
    digest.update(values)
    return digest.hexdigest()
