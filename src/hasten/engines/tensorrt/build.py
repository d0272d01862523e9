"""Builds an engine for a list of GPUs from a graph, in a separate process. No GPU is needed.

The builder needs memory for 2.5 times the weights, may crash, and frees the memory only when its
process ends. So `build` starts this module as a program, `python -m ... REQUEST FD`. REQUEST is
JSON: graph, part (the file to write), targets, and tokens (the minimum, optimum and maximum of each
input with a dynamic size). The result is written to the file descriptor FD as JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hasten.atomic import drafted
from hasten.engines.tensorrt.manifest import Shapes
from hasten.engines.tensorrt.packages import INSTALL, error_log
from hasten.engines.tensorrt.store import FIX_SPACE
from hasten.engines.tensorrt.targets import check_targets
from hasten.errors import EngineError, InputError, UnsupportedError
from hasten.log import logger
from hasten.memory import status_bytes
from hasten.process import how_it_ended, run_module

BUILDER = "hasten.engines.tensorrt.build"
NOISE = "cudaError 35"  # there is no driver, which a build does not need
FREE_MEMORY = (
    "free some memory (a build needs 2.5 times the weights); run it again: finished stages are kept"
)
EXPORT_AGAIN = "delete the graph's folder and export again"
# The builder's message -> fault and fix.
REMEDIES = (
    (
        r"MODEL_DESERIALIZE_FAILED|ParseFromCodedStream|must have at least one output",
        "{graph} is not a complete ONNX graph",
        EXPORT_AGAIN,
    ),
    (
        r"Failed to open file|external weights offset|out of range for file",
        "the weights of {graph} are missing or truncated",
        EXPORT_AGAIN,
    ),
    (
        r"Cannot compile for target\(s\) (?P<gpus>[^,]+(?:, sm\d+)*),.*datatypes: (?P<types>[^.]+)",
        "the GPUs {gpus} do not support {types}, which {graph} uses",
        "remove those targets, or export in another precision: bf16 from sm80, fp16 from sm75",
    ),
    (
        r"optimization profiles|violate shape constraints|[Dd]imensions? (mismatch|not compatible)"
        r"|missing dimensions",
        "{graph} does not support the requested sizes",
        "export again with the text length and sizes of the engine",
    ),
    (
        r"OutOfMemory|out of memory|bad_alloc|Cannot allocate",
        "the builder ran out of memory",
        FREE_MEMORY,
    ),
)


class Built(NamedTuple):
    """Facts about a build.

    Attributes:
        seconds: The time of the build.
        peak_bytes: The peak memory of the build process; None if unknown.
        bytes: The size of the engine.
    """

    seconds: float
    peak_bytes: int | None
    bytes: int


def build(graph: Path, engine: Path, targets: Sequence[str], shapes: Shapes) -> Built:
    """Build one engine for all targets from an exported graph.

    The same graph, targets, shapes and version of TensorRT for RTX result in the same bytes.

    Args:
        graph: The ONNX file, with its weights alongside.
        engine: The file to write; an existing one is replaced when the new one is complete.
        targets: GPUs, such as sm89.
        shapes: The sizes that it is built for.

    Returns:
        Facts about the build.

    Raises:
        InputError: There is no target, or an unknown one.
        UnsupportedError: No engine can be built for a target, or TensorRT is not installed.
        EngineError: The graph is damaged or does not match the shapes, the disk is full, or the
            builder was killed.
    """
    if not targets:
        raise InputError("no target to build an engine for", "add one, for example sm89")
    check_targets(targets, "fp16")  # supported by every target; the builder checks the graph's
    if not graph.is_file():
        raise EngineError(f"{graph}: no such graph", EXPORT_AGAIN)
    start = time.perf_counter()
    logger.debug(f"building an engine for {', '.join(targets)}")
    with drafted(engine) as part:
        request = {
            "graph": str(graph.absolute()),
            "part": str(part.absolute()),
            "targets": list(targets),
            "tokens": _tokens(shapes),
        }
        result = _run(request)
        _check(result, graph, engine)
        if part.stat().st_size != result["bytes"]:
            raise EngineError(f"{engine}: not completely written", FIX_SPACE)
    seconds = round(time.perf_counter() - start, 3)
    return Built(seconds, result["peak_bytes"], result["bytes"])


def _tokens(shapes: Shapes) -> dict[str, list[int]]:
    """Minimum, optimum and maximum of each input's dynamic size."""
    image = [shapes.least, shapes.best, shapes.most]
    both = [shapes.text + number for number in image]
    return {"latents": image, "cos": both, "sin": both}


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Run the builder and return its result. If this raises, the builder has ended."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "builder.log")
        status = run_module(BUILDER, json.dumps(request), log=log, on_message=results.append)
        if status != 0:
            raise _died(status, log.read_text("utf-8", "replace"))
    return results[0]


def _died(status: int, printed: str) -> EngineError | UnsupportedError:
    """The error for a builder that ended without a result."""
    last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")
    if "No module named 'tensorrt_rtx'" in last:
        return UnsupportedError("TensorRT for RTX is not installed", INSTALL)
    ended = f"the builder gave no result: {how_it_ended(status)}"
    if status < 0:
        return EngineError(ended, FREE_MEMORY)
    return EngineError(
        f"{ended}: {last or 'it printed nothing'}",
        "run it again; if the error persists, report this line",
    )


def _check(result: dict[str, Any], graph: Path, engine: Path) -> None:
    """Raise EngineError if the build failed."""
    if "unwritten" in result:
        raise EngineError(f"{engine}: cannot be written: {result['unwritten']}", FIX_SPACE)
    if "errors" not in result:
        return
    errors = [text for text in result["errors"] if NOISE not in text]
    first = " ".join(errors[0].split()) if errors else "no reason given"
    for pattern, fault, fix in REMEDIES:
        if match := re.search(pattern, first):
            raise EngineError(fault.format(graph=graph, **match.groupdict()), fix)
    raise EngineError(
        f"TensorRT for RTX rejected {graph}: {first[:300]}",
        "build with the versions of hasten[tensorrt]; if the error persists, report this line",
    )


def _main(request: str, descriptor: int) -> None:
    """The program: build, and write the result to the file descriptor `descriptor`."""
    result = _build(json.loads(request))
    result["peak_bytes"] = status_bytes("VmHWM")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        print(json.dumps(result), file=file)


def _build(request: dict[str, Any]) -> dict[str, Any]:
    """Build the engine; return its {"bytes"}, the {"errors"} or the reason of {"unwritten"}."""
    import tensorrt_rtx as trt

    log = error_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(network, log).parse_from_file(request["graph"]):
        return {"errors": log.errors}
    config = builder.create_builder_config()
    _set_targets(trt, config, request["targets"])
    if config.add_optimization_profile(_profile(builder, network, request["tokens"])) < 0:
        return {"errors": log.errors}
    with Path(request["part"]).open("r+b") as file:
        writer = _writer(trt, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.fault is None:
            writer.fault = _flush(file)
    if writer.fault is not None:  # the builder ignores write errors and reports success
        return {"unwritten": os.strerror(writer.fault)}
    if not built:
        return {"errors": log.errors}
    return {"bytes": writer.bytes}


def _set_targets(trt: Any, config: Any, targets: list[str]) -> None:
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = trt.ComputeCapability.__members__[target.upper()]
        if not config.set_compute_capability(capability, index):
            raise RuntimeError(f"this TensorRT for RTX does not support the target {target}")


def _profile(builder: Any, network: Any, tokens: dict[str, list[int]]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        given = network.get_input(index)
        sizes = tokens.get(given.name, [0, 0, 0])
        shapes = [[size if n == -1 else n for n in given.shape] for size in sizes]
        profile.set_shape(given.name, *shapes)
    return profile


def _flush(file: BinaryIO) -> int | None:
    """Flush a file to the disk; return the errno of a failure."""
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def _writer(trt: Any, file: BinaryIO) -> Any:
    """A stream that records write errors; the builder would only print an exception."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.fault: int | None = None
            self.bytes = 0

        def write(self, data: Any) -> int:
            if self.fault is not None:
                return 0
            try:
                file.write(data)
            except OSError as error:
                self.fault = error.errno
                return 0
            self.bytes += len(data)
            return len(data)

    return Writer()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
