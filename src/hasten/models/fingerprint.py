"""A short name for a model's weights, the same in every dtype and on every device."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

__all__ = ["fingerprint"]

SAMPLES = 16  # of each parameter


@torch.no_grad()
def fingerprint(transformer: Any) -> str:
    """Sixteen hexadecimal digits from the architecture and the first values of every parameter.

    Values are rounded to bfloat16 first, so that a model and its half-precision copy agree; a fused
    adapter or quantised weights make another model. Waits for the device once.
    """
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    names, samples = [], []
    for name, parameter in transformer.named_parameters():
        names.append(f"{name}{tuple(parameter.shape)}")
        samples.append(parameter.flatten()[:SAMPLES].to(torch.bfloat16))
    digest = hashlib.sha256(json.dumps([config, names], sort_keys=True, default=str).encode())
    digest.update(torch.cat(samples).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
