"""torch.compile of the repeated blocks, or of the transformer's whole forward.

Blocks of one class share one compilation ("regional compilation" in PyTorch's terms), so the first
image waits for two block classes and not for 57 blocks. `fullgraph` is on: a graph break, or
Dynamo giving up after too many recompilations, raises instead of silently running eager.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hasten.errors import UnsupportedError
from hasten.passes.applied import Applied, replace_attribute
from hasten.recipe import Compile

__all__ = ["compile_blocks", "compile_forward", "compiler_errors"]

LIMIT = "torch.compile reached its recompile limit and would have gone on uncompiled"
FIX = (
    "use the recipe without [compile] and decoder.compile: the rest of it works; "
    'compile.mode = "none" with [fuse] needs no compiler'
)
LIMIT_FIX = "set compile.dynamic = true, so that one compilation serves all sizes"


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


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Turn an error of Dynamo or inductor, pages long, into an UnsupportedError of one line."""
    try:
        yield
    except Exception as error:
        if told := _told(error):
            raise told from error
        raise


def _told(error: Exception) -> UnsupportedError | None:
    """What a compiler's error comes to; None for any other. Loads no compiler to find out."""
    kinds = sys.modules.get("torch._dynamo.exc")
    if kinds is None:
        return None
    if isinstance(error, kinds.FailOnRecompileLimitHit):
        return UnsupportedError(LIMIT, LIMIT_FIX)
    if not isinstance(error, kinds.TorchDynamoException):
        return None
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    said = f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__
    return UnsupportedError(f"torch.compile failed: {said}", FIX)
