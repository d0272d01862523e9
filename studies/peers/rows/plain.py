"""Diffusers itself: eager, and with its repeated blocks compiled."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from studies.peers.attention import choose
from studies.peers.rows.applied import Applied
from studies.peers.workload import Workload

__all__ = ["COMPILE", "compile_blocks", "compiled", "eager"]

COMPILE = {"fullgraph": True, "dynamic": False}
"""One compilation a size: its kernels are the quickest, its first image at a new size is not."""


def eager(pipe: Any, _: str, workload: Workload) -> Applied:
    """FluxPipeline as it is, with the quickest attention backend."""
    trial = choose(pipe, workload)
    return Applied(pipe, lambda: workload.steps, {"attention": asdict(trial)})


def compiled(pipe: Any, _: str, workload: Workload) -> Applied:
    """The same, its blocks compiled one by one."""
    plain = eager(pipe, "", workload)
    return Applied(pipe, plain.computed, {**plain.recipe, **compile_blocks(pipe.transformer)})


def compile_blocks(transformer: Any) -> dict[str, Any]:
    """Diffusers' regional compilation; what was asked for, for the recipe."""
    transformer.compile_repeated_blocks(**COMPILE)
    return {"transformer.compile_repeated_blocks": COMPILE}
