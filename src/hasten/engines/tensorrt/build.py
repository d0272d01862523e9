"""From a graph to an engine for a list of GPUs, in a process of its own; no GPU is needed.

The builder takes 2.5 times the weights in memory, may crash, and gives that memory back only by
ending. So `build` starts this very module as a program, `python -m ... REQUEST FD`. REQUEST
is JSON: graph, part (the file to write), targets, and tokens: for each input with a free size, its
least, best and largest size. The result goes to the file descriptor FD as JSON.
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
NOISE = "cudaError 35"  # there is no driver: true, and no reason why anything failed
FREE_MEMORY = (
    "free some memory, it takes 2.5 times the weights; run it again: finished stages are kept"
)
EXPORT_AGAIN = "delete the graph's folder and export again"
# What the builder says -> what that means, and what to do about it.
REMEDIES = (
    (
        r"MODEL_DESERIALIZE_FAILED|ParseFromCodedStream|must have at least one output",
        "{graph} is no whole ONNX graph",
        EXPORT_AGAIN,
    ),
    (
        r"Failed to open file|external weights offset|out of range for file",
        "the weights of {graph} are missing or cut short",
        EXPORT_AGAIN,
    ),
    (
        r"Cannot compile for target\(s\) (?P<what>[^,]+(?:, sm\d+)*),.*datatypes: (?P<types>[^.]+)",
        "the GPUs {what} do not compute in {types}, which {graph} holds",
        "leave those targets out, or export in another precision: bf16 from sm80, fp16 from sm75",
    ),
    (
        r"optimization profiles|violate shape constraints|[Dd]imensions? (mismatch|not compatible)"
        r"|missing dimensions",
        "{graph} does not take the requested sizes",
        "export again with the text length and sizes that the engine is to have",
    ),
    (
        r"OutOfMemory|out of memory|bad_alloc|Cannot allocate",
        "the builder ran out of memory",
        FREE_MEMORY,
    ),
)


class Built(NamedTuple):
    """Seconds that the build took, its peak of memory, and the engine's size."""

    seconds: float
    peak_bytes: int | None
    bytes: int


def build(graph: Path, engine: Path, targets: Sequence[str], shapes: Shapes) -> Built:
    """Build one engine for all targets from an exported graph.

    The same graph, targets, shapes and version of TensorRT for RTX give the same bytes.

    Args:
        graph: The ONNX file, with its weights alongside.
        engine: Where the engine goes; one that is there stays until the new one is whole.
        targets: GPUs, such as sm89.
        shapes: The sizes that it is built for.

    Raises:
        InputError: No target, or an unknown one.
        UnsupportedError: No engine can be built for a target, or TensorRT is not installed.
        EngineError: The graph is damaged or does not fit, the disk is full, or the builder was
            killed.
    """
    if not targets:
        raise InputError("no target to build an engine for", "for example sm89")
    check_targets(targets, "fp16")  # which every target has: what the graph needs, the builder says
    if not graph.is_file():
        raise EngineError(f"{graph}: there is no such graph", EXPORT_AGAIN)
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
            raise EngineError(f"{engine}: not written whole", FIX_SPACE)
    seconds = round(time.perf_counter() - start, 3)
    return Built(seconds, result["peak_bytes"], result["bytes"])


def _tokens(shapes: Shapes) -> dict[str, list[int]]:
    """The free size of each input that has one: at least, at best, at most."""
    image = [shapes.least, shapes.best, shapes.most]
    both = [shapes.text + number for number in image]
    return {"latents": image, "cos": both, "sin": both}


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """The builder's result. Whatever raises here ends the builder first."""
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
        "run it again; if that changes nothing, report this line",
    )


def _check(result: dict[str, Any], graph: Path, engine: Path) -> None:
    """Raise EngineError where the result is not that of a built engine."""
    if "unwritten" in result:
        raise EngineError(f"{engine}: cannot be written: {result['unwritten']}", FIX_SPACE)
    if "errors" not in result:
        return
    errors = [text for text in result["errors"] if NOISE not in text]
    first = " ".join(errors[0].split()) if errors else "without a reason"
    for pattern, fault, fix in REMEDIES:
        if found := re.search(pattern, first):
            raise EngineError(fault.format(graph=graph, **found.groupdict()), fix)
    raise EngineError(
        f"TensorRT for RTX refused {graph}: {first[:300]}",
        "build with the versions of hasten[tensorrt]; if that changes nothing, report this line",
    )


def _main(request: str, answer: int) -> None:
    """Build, and write the result to the file descriptor `answer`. The program's side."""
    result = _build(json.loads(request))
    result["peak_bytes"] = status_bytes("VmHWM")
    with os.fdopen(answer, "w", encoding="utf-8") as file:
        print(json.dumps(result), file=file)


def _build(request: dict[str, Any]) -> dict[str, Any]:
    """{"bytes"} of the engine, or the builder's {"errors"}, or {"unwritten": reason}."""
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
    if writer.fault is not None:  # the builder ignores it and reports success
        return {"unwritten": os.strerror(writer.fault)}
    if not built:
        return {"errors": log.errors}
    return {"bytes": writer.bytes}


def _set_targets(trt: Any, config: Any, targets: list[str]) -> None:
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        known = trt.ComputeCapability.__members__[target.upper()]
        if not config.set_compute_capability(known, index):
            raise RuntimeError(f"this TensorRT for RTX takes no target {target}")


def _profile(builder: Any, network: Any, tokens: dict[str, list[int]]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        given = network.get_input(index)
        sizes = tokens.get(given.name, [0, 0, 0])
        shapes = [[size if n == -1 else n for n in given.shape] for size in sizes]
        profile.set_shape(given.name, *shapes)
    return profile


def _flush(file: BinaryIO) -> int | None:
    """Put a file on the disk; the errno where that failed."""
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def _writer(trt: Any, file: BinaryIO) -> Any:
    """A stream that keeps its own exception: the builder would print it and go on."""

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
