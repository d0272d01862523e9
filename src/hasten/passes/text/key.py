"""Cache keys of text encoder calls: everything that the embeddings depend on.

Embeddings are a function of the token ids and other arguments, of the weights, of their adapters
and adapter scales, and of autocast. Weights are not read completely: the key contains their shapes,
dtypes, torch's count of writes, and 16 values of each, including the last one. The values detect
writes that torch does not count, such as a LoRA adapter that was fused and then unloaded. The
device of the weights is not part of the key, because offloading moves them at every call.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 16  # values read of each tensor
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _NoKeyError(Exception):
    """The embeddings depend on something that cannot be compared."""


def key_of(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """The cache key of a call; calls with equal keys have equal embeddings.

    Returns:
        The key; None if the embeddings must not be cached because they are random (dropout), carry
        gradients, or the encoder has hooks.
    """
    try:
        arguments = (
            *map(_frozen, args),
            *((name, _frozen(kwargs[name])) for name in sorted(kwargs)),
        )
        return (arguments, _state(encoder))
    except _NoKeyError:
        return None


def _frozen(value: object) -> Hashable:
    if isinstance(value, Tensor):
        if value.requires_grad or value.is_meta:
            raise _NoKeyError
        return (*_arithmetic(value.device), value.dtype, value.shape, _bytes(value))
    if isinstance(value, PLAIN):
        return (type(value).__name__, value)
    raise _NoKeyError


def _arithmetic(device: torch.device) -> tuple[str, torch.dtype | None]:
    """A device, and the dtype that autocast currently uses there."""
    on = torch.is_autocast_enabled(device.type)
    return str(device), torch.get_autocast_dtype(device.type) if on else None


def _state(encoder: nn.Module) -> bytes:
    digest = hashlib.blake2b(repr(vars(getattr(encoder, "config", _Empty()))).encode())
    samples: defaultdict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for module in encoder.modules():
        own = vars(module)
        if module.training or _listened_to(module):
            raise _NoKeyError
        if "merged_adapters" in own:  # a layer of PEFT's
            digest.update(repr([own.get(name) for name in ADAPTER_STATE]).encode())
        for tensor in _tensors(own):
            version = -1 if tensor.is_inference() else tensor._version
            digest.update(repr((tensor.shape, tensor.dtype, version)).encode())
            samples[tensor.dtype, tensor.device].append(_sample(tensor))
    for alike in samples.values():
        digest.update(_bytes(torch.cat(alike)))
    return digest.digest()


def _listened_to(module: nn.Module) -> bool:
    """Whether the module has hooks other than the permanent ones of Transformers, which collect
    its outputs."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not str(hook.__module__).startswith("transformers.") for hook in hooks)


ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


class _Empty:
    """Placeholder for a missing config."""


def _tensors(own: dict[str, Any]) -> Iterator[Tensor]:
    """A module's own parameters and buffers; quantised ones as their component tensors."""
    for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
        if tensor is None:
            continue
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise _NoKeyError
        yield from _plain_parts(tensor)


def _plain_parts(tensor: Any) -> Iterator[Tensor]:
    if tensor.is_meta:  # Accelerate's sequential offload keeps the values elsewhere
        raise _NoKeyError
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(tensor, name))
    else:
        yield tensor.detach()


def _sample(tensor: Tensor) -> Tensor:
    """Evenly spaced values in memory order; one-byte dtypes as uint8."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    flat = tensor.permute(order).reshape(-1)  # a view of any dense tensor
    step = max(1, flat.numel() // SAMPLES)
    values = flat[(flat.numel() - 1) % step :: step] if flat.numel() else flat
    return values.view(torch.uint8) if values.dtype.itemsize == 1 else values


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
