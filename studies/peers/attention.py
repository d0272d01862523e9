"""Selects the fastest of Diffusers' attention backends that torch provides, by a short trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from studies.peers.model import tokens_of
from studies.peers.rows.applied import one_line
from studies.peers.workload import Workload

from hasten.benchmark.timer import synchronize

__all__ = ["Trial", "choose", "try_backends"]

BACKENDS = ("native", "_native_cudnn", "_native_flash")
CALLS = 10  # queued at once, so that the launches hide behind the kernels
REPEATS = 3


@dataclass(frozen=True)
class Trial:
    """Milliseconds of one attention per backend and number of tokens, or why it cannot run."""

    chosen: str
    milliseconds: dict[str, list[float]]
    refused: dict[str, str]


def choose(pipe: Any, workload: Workload) -> Trial:
    """Time the backends at the workload's sizes and set the fastest on the transformer."""
    config = pipe.transformer.config
    tokens = [tokens_of(pipe, workload, size) for size in workload.sizes]
    dtype: torch.dtype = getattr(torch, workload.dtype)
    heads = (config.num_attention_heads, config.attention_head_dim)

    def seconds(backend: str, count: int) -> float:
        return _seconds(backend, (1, count, *heads), torch.device(workload.device), dtype)

    trial = try_backends(BACKENDS, tokens, seconds)
    pipe.transformer.set_attention_backend(trial.chosen)
    return trial


def try_backends(
    backends: Sequence[str], tokens: Sequence[int], seconds: Callable[[str, int], float]
) -> Trial:
    """The backend with the least geometric mean over the numbers of tokens; the first one where
    none runs at all, so that the row itself says what is wrong."""
    times: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    for backend in backends:
        try:
            times[backend] = [1e3 * seconds(backend, count) for count in tokens]
        except Exception as error:
            refused[backend] = one_line(error)
    chosen = min(times, key=lambda name: math.prod(times[name]), default=backends[0])
    return Trial(chosen, times, refused)


def _seconds(
    backend: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of one attention over q, k, v of `shape` (batch, tokens, heads, channels)."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    name = AttentionBackendName(backend)
    times = []
    with torch.no_grad():
        for _ in range(REPEATS + 1):  # the first one warms up
            synchronize(device)
            start = perf_counter()
            for _ in range(CALLS):
                dispatch_attention_fn(q, k, v, backend=name)
            synchronize(device)
            times.append((perf_counter() - start) / CALLS)
    return min(times[1:])
