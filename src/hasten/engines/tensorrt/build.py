"""From a graph to an engine for a list of GPUs, in a process of its own; no GPU is needed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from hasten.engines.tensorrt.store import FIX_SPACE, Tell
from hasten.engines.tensorrt.targets import check_targets
from hasten.errors import EngineError, InputError, UnsupportedError
from hasten.process import how_it_ended, start_module

if TYPE_CHECKING:
    from hasten.engines.tensorrt.step import Shapes

__all__ = ["Built", "build"]

BUILDER = "hasten.engines.tensorrt.builder"
NOISE = "cudaError 35"  # there is no driver: true, and no reason why anything failed
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
        "the weights beside {graph} are missing or cut short",
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
        "{graph} does not take the sizes that were asked for",
        "export again with the text length and sizes that the engine is to have",
    ),
    (
        r"OutOfMemory|out of memory|bad_alloc|Cannot allocate",
        "the builder ran out of memory",
        "it takes 2.5 times the weights: free some memory and run it again, finished stages are "
        "kept",
    ),
)


class Built(NamedTuple):
    """Seconds that the build took, its peak of memory, and the engine's size and sha256."""

    seconds: float
    peak_bytes: int | None
    bytes: int
    sha256: str


def build(
    graph: Path, engine: Path, targets: Sequence[str], shapes: Shapes, tell: Tell = lambda _: None
) -> Built:
    """Build one engine for all targets from an exported graph, and put it at `engine`.

    The same graph, targets, shapes and version of TensorRT for RTX give the same bytes. `tell`
    hears what the builder is at.

    Raises InputError or UnsupportedError for a target there is no engine for, and EngineError where
    the graph is damaged, does not fit, the disk is full, or the builder was killed. Then there is
    no engine, nor a part of one; an engine that was there before stays.
    """
    if not targets:
        raise InputError("no target to build an engine for", "for example sm89")
    check_targets(targets, "fp16")  # which every target has: what the graph needs, the builder says
    if not graph.is_file():
        raise EngineError(f"{graph}: there is no such graph", EXPORT_AGAIN)
    part = engine.with_name(f".{engine.name}.part")
    request = {
        "graph": str(graph.absolute()),
        "part": str(part.absolute()),
        "targets": list(targets),
        "tokens": _tokens(shapes),
    }
    start = time.perf_counter()
    tell(f"building an engine for {', '.join(targets)}")
    try:
        told = _run(request)
        _check(told, graph, engine)
        if part.stat().st_size != told["bytes"]:
            raise EngineError(f"{engine}: not written whole", FIX_SPACE)
        os.replace(part, engine)
    finally:
        part.unlink(missing_ok=True)
    seconds = round(time.perf_counter() - start, 3)
    return Built(seconds, told["peak_bytes"], told["bytes"], told["sha256"])


def _tokens(shapes: Shapes) -> dict[str, list[int]]:
    """The free size of each input that has one: at least, at best, at most."""
    image = [shapes.least, shapes.best, shapes.most]
    both = [shapes.text + number for number in image]
    return {"latents": image, "cos": both, "sin": both}


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """What the builder answered. Whatever raises here ends it first."""
    receive, send = os.pipe()
    with os.fdopen(receive, encoding="utf-8") as answer, tempfile.TemporaryFile() as output:
        try:
            child = _start(request, send, output)
        finally:
            os.close(send)
        try:
            told = answer.read()
            status = child.wait()
        finally:
            _end(child)
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
    if status != 0:
        raise _died(status, said)
    found: dict[str, Any] = json.loads(told)
    return found


def _start(request: dict[str, Any], send: int, output: BinaryIO) -> subprocess.Popen[bytes]:
    arguments = json.dumps(request), str(send), str(os.getpid())
    return start_module(BUILDER, *arguments, output=output, keep=send)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _died(status: int, said: str) -> EngineError | UnsupportedError:
    """A builder that ended without an answer."""
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    if "No module named 'tensorrt_rtx'" in last:
        return UnsupportedError(
            "TensorRT for RTX is not installed", "pip install 'hasten[tensorrt]'"
        )
    ended = f"the builder gave no answer, {how_it_ended(status)}"
    if status < 0:
        return EngineError(
            ended,
            "free some memory, it takes 2.5 times the weights; run it again: finished stages are "
            "kept",
        )
    return EngineError(
        f"{ended}: {last or 'it said nothing'}",
        "run it again; if that changes nothing, report this line",
    )


def _check(told: dict[str, Any], graph: Path, engine: Path) -> None:
    """Raise EngineError where the answer is not that of an engine that was built."""
    if "unwritten" in told:
        raise EngineError(f"{engine}: cannot be written: {told['unwritten']}", FIX_SPACE)
    if "errors" not in told:
        return
    errors = [text for text in told["errors"] if NOISE not in text]
    first = " ".join(errors[0].split()) if errors else "without a reason"
    for pattern, fault, fix in REMEDIES:
        if found := re.search(pattern, first):
            raise EngineError(fault.format(graph=graph, **found.groupdict()), fix)
    raise EngineError(
        f"TensorRT for RTX refused {graph}: {first[:300]}",
        "build with the versions of hasten[tensorrt]; if that changes nothing, report this line",
    )
