"""Compare an exported graph, run by onnxruntime on the CPU, with what torch computes.

Random inputs at two sizes, compared in two ways. As a whole: from the inputs to the velocity, each
by itself. Block by block: each block of torch gets what onnxruntime's block before it computed, so
that errors do not accumulate and a fault can be located.

An FP8 graph has a limit per block only. FP8 rounds so coarsely that a difference in the last bit of
float32 flips codes, flipped codes flip others, and after a dozen blocks torch differs from
*itself*, its latents changed by 2^-20, as much as from onnxruntime. The error of the whole, of that
control and against the model before it was quantised are reported as well.

onnxruntime multiplies no bfloat16 on a CPU. A graph in bfloat16 is checked as its float32 twin: the
same nodes and values, against torch in float32 on the same rounded weights.
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
"""Relative errors. A block's output is mostly its input, so a bar on blocks has to be low where the
arithmetic allows it: bfloat16 graphs are compared in float32."""
NUDGE = 2.0**-20
SEED = 0
AFTER = "after the blocks"
"""Stands for a block's name where the output norm and projection are meant."""


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
        transformer: It is left as it is.
        family: Its family.
        graph: The graph's file.
        precision: As at the export, like amax and shapes.
        amax: Of every quantised linear.
        shapes: Sizes of the profile.
        scratch: An empty folder for a copy of the graph.

    Raises:
        EngineError: The graph cannot be read or run, or an error is over its limit; the block with
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
    twin = in_precision(transformer, precision, amax).eval()
    step = Step(twin if precision == "fp16" else twin.float(), family)
    found = []
    for run, velocity in zip(runs, exact, strict=True):
        found.append(_compare(run, step, velocity))
        logger.debug(_line(found[-1]))
    verification = Verification(
        what=f"{precision} graph in onnxruntime against torch, both on the CPU in "
        f"{'float16' if precision == 'fp16' else 'float32'}",
        whole_bar=WHOLE_BARS.get(precision),
        block_bar=BLOCK_BARS[precision],
        sizes=tuple(found),
        seconds=time.perf_counter() - began,
    )
    _hold(verification, graph)
    return verification


def sizes(shapes: Shapes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two sizes within the profile, height × width in tokens: the fewest tokens, and half as many
    again where that is allowed, each as square as can be; else the fewest in one row."""
    larger = min(shapes.most, shapes.least * 3 // 2)
    return most_square(shapes.least), most_square(larger) if larger > shapes.least else (1, larger)


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| over all elements, in float64; infinite where an element is
    not finite."""
    expected = expected.double()
    error = float((found.double() - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error  # NaN compares as smaller than anything


@dataclass(frozen=True)
class _Run:
    """What onnxruntime made of one size's inputs: the velocity, and what the blocks gave, by the
    names of `state_name`."""

    height: int
    width: int
    inputs: dict[str, Tensor]
    velocity: Tensor
    states: dict[str, Tensor]


def _run(
    transformer: Any, family: Family, graph: Path, precision: str, shapes: Shapes, scratch: Path
) -> list[_Run]:
    """The graph at both sizes. Its session, and so its copy of the weights, is gone afterwards."""
    names = float32_twin(graph, scratch, with_states=True)
    _check_complete(graph, family.repeated_blocks(transformer), names)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    driver, runs = OnnxRuntime(scratch / GRAPH), []
    try:
        for height, width in sizes(shapes):
            drawn = sample(transformer, family, shapes, height, width, dtype, SEED)
            inputs = {name: tensor.cpu() for name, tensor in drawn.items()}
            made = driver.session.run([OUTPUT, *names], {n: x.numpy() for n, x in inputs.items()})
            velocity, *states = map(torch.from_numpy, made)
            runs.append(
                _Run(height, width, inputs, velocity, dict(zip(names, states, strict=True)))
            )
    finally:
        driver.close()
    return runs


def _check_complete(graph: Path, blocks: list[tuple[str, nn.Module]], names: list[str]) -> None:
    """A block whose output was optimised away would go unchecked."""
    known = {block_of(name) for name in names}
    missing = [name for name, _ in blocks if name not in known]
    if missing:
        raise EngineError(
            f"{graph} does not name what {missing[0]} gives: it is of another model",
            "delete the folder it is in and export again",
        )


def _compare(run: _Run, step: Step, exact: Tensor | None) -> SizeErrors:
    """Torch against what onnxruntime made: free-running, and block by block."""
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
    """Of each block, then of what comes after the last: torch's output against the graph's, which
    takes its place before the next one runs."""
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


def _hold(found: Verification, graph: Path) -> None:
    """Raise where a bar is missed."""
    faults = [fault for size in found.sizes for fault in _misses(size, found)]
    if faults:
        raise EngineError(
            [f"{graph}: {fault}" for fault in faults],
            "delete the folder it is in and export again; if it comes back, do not use the engine, "
            "and report it with the versions that `hasten doctor` prints",
        )


def _misses(size: SizeErrors, found: Verification) -> Iterator[str]:
    """A line for each bar that is missed at one size."""
    at = f"at {size.height} × {size.width} tokens"
    block = size.worst
    error = size.blocks[block]
    if error > found.block_bar:
        yield f"{block} is not what torch computes: error {error:.2g} {at}, bar {found.block_bar}"
    if math.isinf(size.whole):
        yield f"the velocity is not finite {at}"
    elif found.whole_bar is not None and size.whole > found.whole_bar:
        yield (
            f"the velocity is not what torch computes: error {size.whole:.2g} {at}, bar "
            f"{found.whole_bar}; the largest of a block is {error:.2g}, of {block}"
        )


def _line(size: SizeErrors) -> str:
    text = (
        f"{size.height} × {size.width} tokens: error {size.whole:.2g}, worst block "
        f"{size.blocks[size.worst]:.2g} ({size.worst})"
    )
    if size.control is None:
        return text
    return (
        f"{text}; torch against itself, nudged, {size.control:.2g}; to the unquantised model "
        f"{size.unquantised:.2g}"
    )
