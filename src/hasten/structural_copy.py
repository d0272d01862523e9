"""A structural copy of a pipeline: new modules over the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import UnsupportedError


def structural_copy(pipe: Any) -> Any:
    """A second pipeline whose modules are its own and whose weights lie where the first one's do.

    Nothing is allocated on the device. The scheduler and the tokenizers, which are not safe in
    threads, are copied whole, so two runs can interleave. What replaces parameters of the copy
    (`to`, fusing adapters) leaves the first pipeline as it was.
    """
    twin = copy.copy(pipe)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            setattr(twin, name, replace_tensors(share_weights(component), _alias))
        elif component is not None:
            setattr(twin, name, copy.deepcopy(component))
    if hasattr(twin, "fuse_lora"):
        parts = [part for part in twin.components.values() if isinstance(part, nn.Module)]
        twin.fuse_lora = partial(_fuse_lora, twin.fuse_lora, parts)
        for part in parts:
            if fuse := getattr(part, "fuse_lora", None):
                part.__dict__["fuse_lora"] = partial(_fuse_lora, fuse, [part])
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


def replace_tensors(module: nn.Module, make: Callable[[Tensor], Any]) -> nn.Module:
    """Put what `make` gives for it in the place of each parameter and buffer; tied ones stay tied.

    Returns:
        The module.
    """
    known: dict[int, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in known:
                        known[id(tensor)] = make(tensor)
                    tensors[name] = known[id(tensor)]
    return module


def _alias(tensor: Tensor) -> Any:
    """Another tensor object over the same memory; a tensor class of another library as it is."""
    if type(tensor) is nn.Parameter and type(tensor.data) is Tensor:
        return nn.Parameter(tensor.data, tensor.requires_grad)
    return tensor.data if type(tensor) is Tensor else tensor


@torch.no_grad()
def _fuse_lora(fuse: Callable[..., Any], parts: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Fuse adapters into memory of the copy's own: fusing writes to the weights in place."""
    for part in parts:
        for layer in part.modules():
            base = getattr(layer, "base_layer", None)
            for parameter in () if base is None else base.parameters(recurse=False):
                parameter.data = parameter.data.clone()
    return fuse(*args, **kwargs)
