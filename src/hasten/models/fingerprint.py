"""Fingerprints of a model's weights, independent of dtype and device."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

SAMPLES = 16  # values per parameter


@torch.no_grad()
def fingerprint(transformer: Any) -> str:
    """Hash the architecture and the first values of every parameter.

    Values are rounded to bfloat16 first, so a model and its half-precision copy have the same
    fingerprint. Fused adapters and quantisation change it. Waits for the device once. `unreadable`
    must return an empty string for the transformer.

    Returns:
        Sixteen hexadecimal digits.
    """
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    names, samples = [], []
    for name, parameter in transformer.named_parameters():
        names.append(f"{name}{tuple(parameter.shape)}")
        samples.append(parameter.flatten()[:SAMPLES].to(torch.bfloat16))
    digest = hashlib.sha256(json.dumps([config, names], sort_keys=True, default=str).encode())
    values = (
        torch.cat(samples)
        if len({sample.device for sample in samples}) == 1
        else torch.cat([sample.cpu() for sample in samples])
    )
    digest.update(values.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def unreadable(transformer: Any) -> str:
    """Why a model's weights cannot be read; empty if they can.

    Quantisation libraries replace parameters by their own tensor classes; offloading libraries
    leave parameters without values.
    """
    if where := offloaded(transformer):
        return f"the weights are {where}"
    for name, parameter in transformer.named_parameters():
        if parameter.is_meta:
            return f"{name} has no values (it is a meta tensor)"
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            kind = type(parameter.data if type(parameter) is nn.Parameter else parameter).__name__
            return f"{name} is a {kind}, not a plain parameter"
        if not parameter.is_floating_point():
            return f"{name} is stored in {str(parameter.dtype).removeprefix('torch.')}"
    return ""


def offloaded(transformer: Any) -> str:
    """How a model's weights are offloaded between its calls; empty if they are not."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if any("group_offloading" in name for name in getattr(registry, "hooks", ())):
            return "offloaded by groups (enable_group_offload)"
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        if any(getattr(one, "offload", False) for one in hooks):
            return "offloaded layer by layer (enable_sequential_cpu_offload)"
    return ""
