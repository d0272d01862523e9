"""The `[compile]` pass: torch.compile of the repeated blocks or of the transformer's forward.

Blocks of one class share one compilation ("regional compilation" in PyTorch's terms), so the first
image waits for the compilation of two block classes, not of 57 blocks. `fullgraph` is on: a graph
break or Dynamo's recompile limit raises an error instead of silently running eager.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from hasten.errors import UnsupportedError
from hasten.recipe import Compile
from hasten.step.applied import Applied
from hasten.step.call import Inner, Output, StepCall
from hasten.step.chain import StepChain

LIMIT = "torch.compile reached its recompile limit and would have continued uncompiled"
FIX = (
    "use the recipe without [compile] and decoder.compile, or with [fuse] and "
    'compile.mode = "none", which needs no compiler'
)
LIMIT_FIX = (
    "find what differs between calls: for sizes, set compile.dynamic = true; for adapters, load "
    "them under one adapter_name; restore() frees compiled code"
)
TORCHS_LIMIT, OWN_LIMIT = 8, 64  # compilations of one class, over all pipelines of a process


def compile_blocks(blocks: list[tuple[str, nn.Module]], recipe: Compile) -> Applied:
    """Compile each block in place; the compilation itself happens at its first call."""
    modules = [block for _, block in blocks]
    _compile(modules, recipe.dynamic)
    classes = Counter(type(block).__name__ for _, block in blocks)
    listed = ", ".join(f"{count} × {name}" for name, count in classes.items())
    return Applied(
        name="compile",
        description=f"{listed}, each class compiled once for all its blocks",
        undo=partial(_undo, modules),
        renew=partial(_compile, modules, recipe.dynamic),
        unchanged=(("the other modules", "run once per step, outside the repeated blocks"),),
    )


class CompiledForward:
    """The transformer's forward compiled as one graph; a deep copy compiles its own forward."""

    name = "compile"

    def __init__(self, forward: Callable[..., Any], dynamic: bool | None) -> None:
        self.forward, self.dynamic = forward, dynamic
        self.compiled: Callable[..., Any] = torch.compile(forward, fullgraph=True, dynamic=dynamic)

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        return Output.of(self.compiled(**call.inputs, return_dict=call.return_dict))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        return CompiledForward(copy.deepcopy(self.forward, memo), self.dynamic)

    def live(self) -> str:
        return ""


def compile_forward(chain: StepChain, recipe: Compile) -> Applied:
    """Compile the transformer's forward as one graph."""
    chain.push(CompiledForward(chain.original, recipe.dynamic))
    undo = partial(chain.remove, CompiledForward.name)
    return Applied(name="compile", description="the transformer's forward, as one graph", undo=undo)


def _compile(blocks: Sequence[nn.Module], dynamic: bool | None) -> None:
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic)


def _undo(blocks: Sequence[nn.Module]) -> None:
    """Drop the compiled code too: Dynamo counts compilations per class, over all pipelines."""
    from torch._dynamo.eval_frame import reset_code  # type: ignore[attr-defined]

    for block in blocks:
        block._compiled_call_impl = None
    for forward in {type(block).forward for block in blocks}:
        reset_code(inspect.unwrap(forward).__code__)


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Convert errors of Dynamo and Inductor into one-line errors.

    Dynamo counts compilations per class, over all pipelines of a process and all their adapters.
    So torch's default limit is raised inside the context; a limit set by the user is kept.

    Raises:
        UnsupportedError: Compilation failed.
    """
    try:
        with _raised_limit():
            yield
    except Exception as error:
        if refusal := _one_line_for(error):
            raise refusal from error
        raise


def _raised_limit() -> AbstractContextManager[object]:
    config = sys.modules.get("torch._dynamo.config")
    if config is None or config.recompile_limit != TORCHS_LIMIT:
        return nullcontext()
    raised: AbstractContextManager[object] = config.patch(recompile_limit=OWN_LIMIT)
    return raised


def _one_line_for(error: Exception) -> UnsupportedError | None:
    """The one-line form of a compiler's error; None for any other. Does not load the compiler."""
    kinds = sys.modules.get("torch._dynamo.exc")
    if kinds is None:
        return None
    if isinstance(error, kinds.FailOnRecompileLimitHit):
        return UnsupportedError(LIMIT, LIMIT_FIX)
    if not isinstance(error, kinds.TorchDynamoException):
        return None
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    message = f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__
    return UnsupportedError(f"torch.compile failed: {message}", FIX)
