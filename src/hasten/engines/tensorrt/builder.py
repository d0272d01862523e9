"""The program that builds one engine: `python -m hasten.engines.tensorrt.builder REQUEST FD`.

A process of its own, because the builder takes 2.5 times the weights in memory, may crash, and
gives that memory back only by ending. REQUEST is JSON: graph, part (the file to write), targets,
and tokens: for each input with a free size, what that size is at least, at best and at most. What
came of it goes to the file descriptor FD as JSON; `hasten.engines.tensorrt.build` reads it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

from hasten.memory import status_bytes

__all__ = ["main"]

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main(request: str, answer: int, parent: int) -> None:
    """Build, and write what came of it to the file descriptor `answer`."""
    _end_with(parent)
    told = _build(json.loads(request))
    told["peak_bytes"] = status_bytes("VmHWM")
    with os.fdopen(answer, "w", encoding="utf-8") as file:
        json.dump(told, file)


def _build(request: dict[str, Any]) -> dict[str, Any]:
    """{"bytes", "sha256"} of the engine, or {"errors"}: the builder's words, the first one first,
    or {"unwritten"}: what writing failed with."""
    import tensorrt_rtx as trt

    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(network, log).parse_from_file(request["graph"]):
        return {"errors": log.errors}
    config = builder.create_builder_config()
    _set_targets(trt, config, request["targets"])
    if config.add_optimization_profile(_profile(builder, network, request["tokens"])) < 0:
        return {"errors": log.errors}
    with Path(request["part"]).open("wb") as file:
        writer = _writer(trt, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.fault is None:
            writer.fault = _flush(file)
    if writer.fault is not None:  # the builder takes no notice and says that all is well
        return {"unwritten": os.strerror(writer.fault)}
    if not built:
        return {"errors": log.errors}
    return {"bytes": writer.bytes, "sha256": writer.digest.hexdigest()}


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


def _log(trt: Any) -> Any:
    """A logger that keeps errors: the builder's reasons are nowhere else."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(text)

    return Log()


def _writer(trt: Any, file: BinaryIO) -> Any:
    """A stream that keeps its own exception: the builder would print it and go on."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.fault: int | None = None
            self.bytes = 0
            self.digest = hashlib.sha256()

        def write(self, data: Any) -> int:
            if self.fault is not None:
                return 0
            try:
                file.write(data)
            except OSError as error:
                self.fault = error.errno
                return 0
            self.digest.update(data)
            self.bytes += len(data)
            return len(data)

    return Writer()


def _end_with(parent: int) -> None:
    """Have the system kill this process with the one that started it. Linux."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
