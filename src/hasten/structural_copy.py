"""A structural copy of a pipeline: new modules, the same weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from hasten.errors import UnsupportedError

__all__ = ["share_weights", "structural_copy"]


def structural_copy(pipe: Any) -> Any:
    """A second pipeline whose modules are its own and whose parameters are the first one's.

    Nothing is allocated on the device. The scheduler is copied whole, so two runs can interleave.
    """
    twin = copy.copy(pipe)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            setattr(twin, name, share_weights(component))
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    return twin


def share_weights(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """Copy a module tree node by node; tensors, configs and processors are shared."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    if hasattr(module, "_hf_hook") or module._compiled_call_impl is not None:
        raise UnsupportedError(
            f"{type(module).__name__} cannot be copied: it is offloaded or compiled",
            "copy before offloading or compiling, and let the recipe do both",
        )
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(
        (key, copy.copy(value) if isinstance(value, dict) else value)
        for key, value in module.__dict__.items()
    )
    memo[id(module)] = twin
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else share_weights(child, memo)
    return twin
