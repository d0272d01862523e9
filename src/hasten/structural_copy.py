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
    """Copy a pipeline: the modules are new, the weights are shared.

    Nothing is allocated on the device. The scheduler and the tokenizers are deep copies because
    they are not thread-safe, so runs of the two pipelines can interleave. Operations that replace
    parameters of the copy (`to`, fusing adapters) leave the original pipeline unchanged.
    """
    duplicate = copy.copy(pipe)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            setattr(duplicate, name, replace_tensors(share_weights(component), _alias))
        elif component is not None:
            setattr(duplicate, name, copy.deepcopy(component))
    if hasattr(duplicate, "fuse_lora"):
        parts = [part for part in duplicate.components.values() if isinstance(part, nn.Module)]
        duplicate.fuse_lora = partial(_fuse_lora, duplicate.fuse_lora, parts)
        for part in parts:
            if fuse := getattr(part, "fuse_lora", None):
                part.__dict__["fuse_lora"] = partial(_fuse_lora, fuse, [part])
    return duplicate


def share_weights(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """Copy a module tree node by node; tensors, configs and processors are shared.

    Args:
        module: The root of the tree.
        memo: Copies made so far, by the id of the original.

    Raises:
        UnsupportedError: A module is offloaded or compiled.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    if hasattr(module, "_hf_hook") or module._compiled_call_impl is not None:
        raise UnsupportedError(
            f"{type(module).__name__} cannot be copied: it is offloaded or compiled",
            "copy it before offloading or compiling, and use the recipe for both",
        )
    duplicate = module.__class__.__new__(module.__class__)
    duplicate.__dict__.update(
        (key, copy.copy(value) if isinstance(value, dict) else value)
        for key, value in module.__dict__.items()
    )
    memo[id(module)] = duplicate
    for name, child in module._modules.items():
        duplicate._modules[name] = None if child is None else share_weights(child, memo)
    return duplicate


def replace_tensors(module: nn.Module, make: Callable[[Tensor], Any]) -> nn.Module:
    """Replace each parameter and buffer by `make(tensor)`; tied tensors stay tied.

    Returns:
        The module.
    """
    replacements: dict[int, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in replacements:
                        replacements[id(tensor)] = make(tensor)
                    tensors[name] = replacements[id(tensor)]
    return module


def _alias(tensor: Tensor) -> Any:
    """A new tensor object over the same memory; tensor classes of other libraries are unchanged."""
    if type(tensor) is nn.Parameter and type(tensor.data) is Tensor:
        return nn.Parameter(tensor.data, tensor.requires_grad)
    return tensor.data if type(tensor) is Tensor else tensor


@torch.no_grad()
def _fuse_lora(fuse: Callable[..., Any], parts: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Fuse adapters into copies of the shared weights, because fusing writes in place."""
    for part in parts:
        for layer in part.modules():
            base = getattr(layer, "base_layer", None)
            for parameter in () if base is None else base.parameters(recurse=False):
                parameter.data = parameter.data.clone()
    return fuse(*args, **kwargs)
