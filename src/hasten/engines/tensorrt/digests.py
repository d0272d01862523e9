"""What a pipeline is, in sha256: its weights and all that a drawing depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import TYPE_CHECKING, Any

from hasten.errors import EngineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["config_of", "pipeline_digest", "weights_digest"]


def weights_digest(model: Any, dtype: torch.dtype | None = None) -> str:
    """sha256 over names, shapes and values of all tensors, rounded to `dtype` (bfloat16).

    Rounded, so that a model and its copy in another dtype agree, and because a graph holds no more.
    Several tensors are read at once; each thread holds one of them, rounded.
    """
    import torch

    kept = dtype or torch.bfloat16
    tensors: Mapping[str, Tensor] = model.state_dict()
    with ThreadPoolExecutor(cpu_count()) as threads:
        digests = threads.map(lambda name: _digest(name, tensors[name], kept), sorted(tensors))
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def pipeline_digest(pipe: Any, weights: str) -> dict[str, Any]:
    """All that a drawing depends on: modules by their weights and configuration. weights: those of
    the transformer, which take long to read."""
    found: dict[str, Any] = {"dtype": str(pipe.dtype), "device": pipe.device.type}
    for name, component in sorted(pipe.components.items()):
        if hasattr(component, "state_dict") and name != "vae":
            found[name] = weights if name == "transformer" else weights_digest(component)
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


def _digest(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    import torch

    if tensor.is_meta:
        raise EngineError(
            f"the tensor {name} of the transformer has no values",
            "load the whole model before exporting it, nothing offloaded",
        )
    rounded = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
    flat = rounded.cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{name}{tuple(tensor.shape)}".encode())
    values: Any = flat.view(torch.uint8).numpy()
    digest.update(values)
    return digest.hexdigest()
