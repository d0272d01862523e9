"""torch.compile of the repeated blocks, or of the transformer's whole forward.

Blocks of one class share one compilation ("regional compilation" in PyTorch's terms), so the first
image waits for two block classes and not for 57 blocks. `fullgraph` is on: a graph break, or
Dynamo giving up after too many recompilations, raises instead of silently running eager.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from hasten.passes.applied import Applied, replace_attribute
from hasten.recipe import Compile

__all__ = ["compile_blocks", "compile_forward"]


def compile_blocks(blocks: list[tuple[str, nn.Module]], recipe: Compile) -> Applied:
    """Compile each block in place (lazily: the work happens at its first call)."""
    for _, block in blocks:
        block.compile(fullgraph=True, dynamic=recipe.dynamic)

    def undo() -> None:
        for _, block in blocks:
            block._compiled_call_impl = None

    classes = Counter(type(block).__name__ for _, block in blocks)
    listed = ", ".join(f"{count} × {name}" for name, count in classes.items())
    return Applied(
        name="compile",
        what=f"{listed}, each class compiled once for all its blocks",
        undo=undo,
        left_alone=(
            ("embedders, norm_out, proj_out", "run once a step, outside the repeated blocks"),
        ),
    )


def compile_forward(transformer: nn.Module, recipe: Compile) -> Applied:
    """Compile the transformer's forward as one graph."""
    compiled = torch.compile(transformer.forward, fullgraph=True, dynamic=recipe.dynamic)
    undo = replace_attribute(transformer, "forward", compiled)
    return Applied(name="compile", what="the transformer's forward, as one graph", undo=undo)
