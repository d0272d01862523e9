"""Diffusers with torchao's FP8: dynamic, one scale a row, and its repeated blocks compiled."""

from __future__ import annotations

from typing import Any

import torch
from studies.peers.rows.applied import Applied, Unsupported
from studies.peers.rows.plain import compile_blocks, eager
from studies.peers.workload import Workload

__all__ = ["check_fp8", "compiled_fp8", "is_quantized", "quantize_blocks"]

EVERY = "all"
UNTUNED = "untuned"
OLDEST = (8, 9)


def compiled_fp8(pipe: Any, which: str, workload: Workload) -> Applied:
    """`which`: "" leaves the modulations (one row of input) in bfloat16, "all" quantises them;
    "untuned" is "" without the inductor settings that torchao brings, which take minutes."""
    check_fp8(workload)
    plain = eager(pipe, "", workload)
    quantized = quantize_blocks(pipe.transformer, every=which == EVERY, tuned=which != UNTUNED)
    recipe = {**plain.recipe, **quantized}
    return Applied(pipe, plain.computed, {**recipe, **compile_blocks(pipe.transformer)})


def quantize_blocks(transformer: Any, *, every: bool = False, tuned: bool = True) -> dict[str, Any]:
    """torchao's `quantize_` with its own defaults on the blocks' linears; what was asked for.

    tuned: with coordinate descent and the other inductor settings that torchao turns on by itself.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    names: list[str] = []

    def chosen(module: torch.nn.Module, name: str) -> bool:
        if not (isinstance(module, torch.nn.Linear) and is_quantized(name, every=every)):
            return False
        names.append(name)
        return True

    asked = {} if tuned else {"set_inductor_config": False}
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **asked)
    quantize_(transformer, config, filter_fn=chosen)
    return {
        "torchao.quantize_": {
            "Float8DynamicActivationFloat8WeightConfig": {"granularity": "PerRow()", **asked}
        },
        "linears": len(names),
        "kinds of linears": sorted({_within_block(name) for name in names}),
    }


def is_quantized(name: str, *, every: bool) -> bool:
    """Whether the linear of this name lies in a repeated block and, unless `every`, in no norm."""
    stack, *inside = name.split(".")
    in_block = stack in ("transformer_blocks", "single_transformer_blocks")
    return in_block and (every or not any(part.startswith("norm") for part in inside))


def check_fp8(workload: Workload) -> None:
    """Raise Unsupported where torchao's FP8 has no kernels."""
    device = torch.device(workload.device)
    if device.type != "cuda":
        raise Unsupported(f"torchao's FP8 needs a CUDA GPU; this is {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise Unsupported(f"torchao's FP8 needs compute capability 8.9; this GPU has {capability}")
    if workload.dtype != "bfloat16":
        raise Unsupported(f"torchao's row-wise FP8 needs bfloat16 weights, not {workload.dtype}")


def _within_block(name: str) -> str:
    stack, _, *inside = name.split(".")
    return ".".join([stack, "*", *inside])
