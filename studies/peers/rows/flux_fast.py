"""The optimisations that huggingface/flux-fast lists, as far as they install from an index.

Left out: its FP8 flash attention 3, which has no wheel, and ahead-of-time packaging, which makes
the same kernels as compiling in place does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config
from studies.peers.rows.applied import Applied
from studies.peers.rows.float8 import EVERY, check_fp8, quantize_blocks
from studies.peers.rows.plain import eager
from studies.peers.workload import Workload

__all__ = ["QUICK", "flux_fast", "fuse", "prepare"]

QUICK = "quick"
COMPILE = {"mode": "max-autotune", "fullgraph": True, "dynamic": False}
INDUCTOR = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": False,
}


def flux_fast(pipe: Any, which: str, workload: Workload) -> Applied:
    """`which`: "" is the list; "all" quantises the modulations too, as flux-fast itself does;
    "quick" keeps fusion, FP8 and CUDA graphs but leaves out all tuning, torchao's too, which takes
    minutes."""
    check_fp8(workload)
    recipe = {**eager(pipe, "", workload).recipe, **fuse(pipe)}
    quick = which == QUICK
    recipe |= quantize_blocks(pipe.transformer, every=which == EVERY, tuned=not quick)
    if quick:
        recipe |= prepare(pipe, {**COMPILE, "mode": "reduce-overhead"}, {})
    else:
        recipe |= prepare(pipe, COMPILE, INDUCTOR)
    return Applied(pipe, lambda: workload.steps, recipe)


def fuse(pipe: Any) -> dict[str, Any]:
    """Fused q, k, v in transformer and VAE, the VAE's weights channels last."""
    pipe.transformer.fuse_qkv_projections()
    pipe.vae.fuse_qkv_projections()
    pipe.vae.to(memory_format=torch.channels_last)
    return {"fuse_qkv_projections": ["transformer", "vae"], "channels_last": ["vae"]}


def prepare(pipe: Any, options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Inductor's settings, then the whole transformer and the decoder compiled with `options`."""
    for name, value in settings.items():
        setattr(torch._inductor.config, name, value)
    pipe.transformer.compile(**options)
    pipe.vae.decode = torch.compile(pipe.vae.decode, **options)
    return {"torch._inductor.config": settings, "torch.compile of transformer, decode": options}
