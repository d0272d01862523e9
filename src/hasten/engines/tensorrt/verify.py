"""Compares an exported graph, run by onnxruntime on the CPU, with torch.

Random inputs at two sizes are compared in two ways. The velocities are compared after independent
runs. The blocks are compared one by one: each block of torch gets the output of onnxruntime's
preceding block, so that errors do not accumulate and a fault can be located.

For an FP8 graph, only the blocks have a limit. FP8 rounding is so coarse that a difference in the
last bit of float32 changes codes, and changed codes change others. After a dozen blocks, torch
differs from *itself*, with its latents changed by 2^-20, as much as from onnxruntime. The errors of
the velocity, of that control and against the unquantised model are reported, too.

onnxruntime has no bfloat16 products on a CPU. A bfloat16 graph is checked as its float32 version:
the same nodes and values, against torch in float32 with the same rounded weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.tensorrt.export import in_dtype, in_precision
from hasten.engines.tensorrt.files import GRAPH
from hasten.engines.tensorrt.graph import float32_twin
from hasten.engines.tensorrt.manifest import Shapes, SizeErrors, Verification
from hasten.engines.tensorrt.nodes import Amax
from hasten.engines.tensorrt.step import (
    OUTPUT,
    Step,
    block_of,
    most_square,
    sample,
    state_name,
)
from hasten.errors import EngineError
from hasten.families.family import Family
from hasten.log import logger
from hasten.quantization.report import watched

WHOLE_BARS = {"bf16": 0.002, "fp16": 0.002}
BLOCK_BARS = {"bf16": 0.001, "fp16": 0.01, "fp8": 0.01}
"""Limits of relative errors. A block's output is mostly its input, so the limit for blocks is low
where the arithmetic allows it: bfloat16 graphs are compared in float32."""
NUDGE = 2.0**-20
SEED = 0
AFTER = "after the blocks"
"""The name of the output norm and projection in place of a block's name."""


@torch.no_grad()
def verify(
    transformer: nn.Module,
    family: Family,
    graph: Path,
    precision: str,
    amax: Mapping[str, Amax] | None,
    shapes: Shapes,
    scratch: Path,
) -> Verification:
    """Compare an exported graph with the transformer that it was exported from.

    The errors at each size are logged at DEBUG.

    Args:
        transformer: The transformer; it is not changed.
        family: Its family.
        graph: The graph file.
        precision: The precision of the export.
        amax: The calibrated values of every quantised linear, as for the export.
        shapes: The sizes of the engine.
        scratch: An empty folder for a copy of the graph.

    Returns:
        The errors and their limits.

    Raises:
        EngineError: The graph cannot be read or run, or an error exceeds its limit; the block with
            the largest error is named.
        UnsupportedError: A package is missing.
    """
    began = time.perf_counter()
    quantised = precision == "fp8"
    runs = _run(transformer, family, graph, precision, shapes, scratch)
    exact: list[Tensor | None] = [None] * len(runs)
    if quantised:
        original = Step(in_dtype(transformer, torch.float32).eval(), family)
        exact = [original(**run.inputs) for run in runs]
        del original
    converted = in_precision(transformer, precision, amax).eval()
    step = Step(converted if precision == "fp16" else converted.float(), family)
    errors = []
    for run, velocity in zip(runs, exact, strict=True):
        errors.append(_compare(run, step, velocity))
        logger.debug(_line(errors[-1]))
    verification = Verification(
        what=f"{precision} graph in onnxruntime against torch, both on the CPU in "
        f"{'float16' if precision == 'fp16' else 'float32'}",
        whole_bar=WHOLE_BARS.get(precision),
        block_bar=BLOCK_BARS[precision],
        sizes=tuple(errors),
        seconds=time.perf_counter() - began,
    )
    _check_limits(verification, graph)
    return verification


def sizes(shapes: Shapes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Select two sizes within the profile, as height × width in tokens.

    They have the minimum number of tokens and 1.5 times as many, if the profile allows it, and are
    as square as possible. Otherwise, the second size has the minimum number in one row.
    """
    larger = min(shapes.most, shapes.least * 3 // 2)
    return most_square(shapes.least), most_square(larger) if larger > shapes.least else (1, larger)


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| over all elements, in float64; infinite for NaN results."""
    expected = expected.double()
    error = float((actual.double() - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error  # NaN compares as smaller than anything


@dataclass(frozen=True)
class _Run:
    """Results of onnxruntime at one size: the velocity, and the blocks' outputs by `state_name`."""

    height: int
    width: int
    inputs: dict[str, Tensor]
    velocity: Tensor
    states: dict[str, Tensor]


def _run(
    transformer: Any, family: Family, graph: Path, precision: str, shapes: Shapes, scratch: Path
) -> list[_Run]:
    """Run the graph at both sizes; its session and weights are freed afterwards."""
    names = float32_twin(graph, scratch, with_states=True)
    _check_complete(graph, family.repeated_blocks(transformer), names)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    driver, runs = OnnxRuntime(scratch / GRAPH), []
    try:
        for height, width in sizes(shapes):
            sampled = sample(transformer, family, shapes, height, width, dtype, SEED)
            inputs = {name: tensor.cpu() for name, tensor in sampled.items()}
            arrays = driver.session.run([OUTPUT, *names], {n: x.numpy() for n, x in inputs.items()})
            velocity, *states = map(torch.from_numpy, arrays)
            runs.append(
                _Run(height, width, inputs, velocity, dict(zip(names, states, strict=True)))
            )
    finally:
        driver.close()
    return runs


def _check_complete(graph: Path, blocks: list[tuple[str, nn.Module]], names: list[str]) -> None:
    """Check that the graph has the output of every block; it could not be compared otherwise."""
    named = {block_of(name) for name in names}
    missing = [name for name, _ in blocks if name not in named]
    if missing:
        raise EngineError(
            f"{graph} has no output of {missing[0]}: it belongs to another model",
            "delete its folder and export again",
        )


def _compare(run: _Run, step: Step, exact: Tensor | None) -> SizeErrors:
    """Compare torch with the results of onnxruntime: the velocity, and block by block."""
    velocity = step(**run.inputs)
    control = None
    if exact is not None:
        nudged = {**run.inputs, "latents": run.inputs["latents"] * (1 + NUDGE)}
        control = relative_distance(step(**nudged), velocity)
    return SizeErrors(
        height=run.height,
        width=run.width,
        whole=relative_distance(run.velocity, velocity),
        blocks=_block_errors(run, step),
        control=control,
        unquantised=None if exact is None else relative_distance(run.velocity, exact),
    )


def _block_errors(run: _Run, step: Step) -> dict[str, float]:
    """The errors of each block, then of the output layers.

    The graph's output of a block replaces torch's before the next block runs.
    """
    errors: dict[str, float] = {}

    def compare(name: str, _: nn.Module, __: Any, output: tuple[Tensor, ...]) -> Any:
        states = [run.states.get(state_name(name, at)) for at in range(len(output))]
        pairs = list(zip(states, output, strict=True))
        errors[name] = max(relative_distance(a, b) for a, b in pairs if a is not None)
        return tuple(tensor if state is None else state for state, tensor in pairs)

    blocks = step.family.repeated_blocks(step.transformer)
    with watched(blocks, lambda name: partial(compare, name)):
        velocity = step(**run.inputs)
    errors[AFTER] = relative_distance(run.velocity, velocity)
    return errors


def _check_limits(verification: Verification, graph: Path) -> None:
    """Raise EngineError if an error exceeds its limit."""
    faults = [fault for size in verification.sizes for fault in _violations(size, verification)]
    if faults:
        raise EngineError(
            [f"{graph}: {fault}" for fault in faults],
            "delete its folder and export again; if the error persists, do not use the engine, and "
            "report it with the versions that `hasten doctor` prints",
        )


def _violations(size: SizeErrors, verification: Verification) -> Iterator[str]:
    """One line per error that exceeds its limit at one size."""
    at = f"at {size.height} × {size.width} tokens"
    block = size.worst
    error = size.blocks[block]
    if error > verification.block_bar:
        yield f"{block} differs from torch: error {error:.2g} {at}, limit {verification.block_bar}"
    if math.isinf(size.whole):
        yield f"the velocity is not finite {at}"
    elif verification.whole_bar is not None and size.whole > verification.whole_bar:
        yield (
            f"the velocity differs from torch: error {size.whole:.2g} {at}, limit "
            f"{verification.whole_bar}; the largest error of a block is {error:.2g}, of {block}"
        )


def _line(size: SizeErrors) -> str:
    text = (
        f"{size.height} × {size.width} tokens: error {size.whole:.2g}, largest error of a block "
        f"{size.blocks[size.worst]:.2g} ({size.worst})"
    )
    if size.control is None:
        return text
    return (
        f"{text}; torch against itself with perturbed latents {size.control:.2g}; against the "
        f"unquantised model {size.unquantised:.2g}"
    )
