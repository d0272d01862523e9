"""Measures time and memory, synchronising with the device."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from hasten.memory import status_bytes

P = ParamSpec("P")
T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(
    device: torch.device, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> tuple[T, float]:
    """Call `work(*args, **kwargs)`, with the device synchronised before and after.

    Returns:
        The result of the call, and its duration in seconds.
    """
    synchronize(device)
    start = perf_counter()
    result = work(*args, **kwargs)
    synchronize(device)
    return result, perf_counter() - start


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory of a CUDA device. The peak of other devices cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Peak bytes since the last reset, and a note on how they were measured."""
    if device.type == "cuda":
        note = "peak memory: allocated by torch on the GPU"
        return torch.cuda.max_memory_allocated(device), note
    return _peak_resident(), "peak memory: resident set of the process"


def storage_bytes(components: Iterable[object]) -> int:
    """Bytes of all parameters and buffers; a storage that several tensors share counts once.

    Components that are not modules, such as tokenizers, do not count.
    """
    storages = {}
    for module in (part for part in components if isinstance(part, nn.Module)):
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            storages[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def _peak_resident() -> int:
    peak = status_bytes("VmHWM")
    if peak is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
