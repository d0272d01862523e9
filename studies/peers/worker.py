"""One row in a process of its own: `python -m studies.peers.worker FD`.

It receives commands over the socket FD and executes them one at a time:

    import  load what the row needs, without touching the device
    build   make the pipeline on the device
    apply   make the row of it
    image   render and time one image
    held    what stays reserved beside what is allocated (CUDA graphs' pools), and the summary

If a command fails, the reply has `fault` ("unsupported", "out of memory" or "failed") and `reason`.
The process ends when the coordinator closes the socket.
"""

from __future__ import annotations

import gc
import socket
import sys
import traceback
from collections.abc import Callable
from time import perf_counter
from typing import Any

from studies.peers.channel import Channel, ClosedError
from studies.peers.rows import KINDS, Applied, Spec, Unsupported, one_line
from studies.peers.workload import Workload

from hasten.errors import HastenError, UnsupportedError
from hasten.log import quiet_libraries

__all__ = ["Row", "fault_of", "serve"]

Answer = dict[str, Any]


class Row:
    """The commands; each returns its measurements."""

    def __init__(self) -> None:
        self.pipe: Any = None
        self.applied: Applied | None = None
        self.stopwatch: Any = None
        self.variant = ""

    def do_import(self, *, row: list[str], workload: dict[str, Any]) -> Answer:
        """Import everything; CUDA is not touched, so that nothing is held on the GPU."""
        import studies.peers.flags
        import studies.peers.image
        import studies.peers.model  # noqa: F401
        import torch

        self.spec = Spec(*row)
        self.workload = Workload.from_json(workload)
        self.device = torch.device(self.workload.device)
        try:
            self.apply = KINDS[self.spec.kind].load()
        except ImportError as error:
            raise Unsupported(f"{one_line(error)}; see studies/peers/requirements.txt") from None
        return {}

    def do_build(self) -> Answer:
        """The pipeline, its weights on the device."""
        from studies.peers.model import build_pipeline

        before = self._free()
        start = perf_counter()
        self.pipe = build_pipeline(self.workload)
        self._settle()
        return {"load_seconds": perf_counter() - start, "free_before": before, **self._memory()}

    def do_apply(self) -> Answer:
        """The row, and the recipe that made it, the compiler's settings it changed included."""
        import torch
        from studies.peers.flags import changed, compiler_settings
        from studies.peers.image import Stopwatch

        torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than go on uncompiled
        before = compiler_settings()
        start = perf_counter()
        self.applied = self.apply(self.pipe, self.spec.argument, self.workload)
        self._settle()
        seconds = perf_counter() - start
        self.variant = self.spec.variants[0]
        self.stopwatch = Stopwatch(self.pipe.vae, self.device)
        flags = changed(before, compiler_settings())
        recipe = {**self.applied.recipe, "compiler settings changed": flags}
        return {"setup_seconds": seconds, "recipe": recipe, **self._memory()}

    def do_image(self, *, number: int, size: int, variant: str) -> Answer:
        """One image of the given number, timed; the variant is switched to before."""
        from studies.peers.model import call_arguments

        assert self.applied is not None
        if variant != self.variant:
            self.applied.select(variant)
            self.variant = variant
        arguments = call_arguments(self.pipe, self.workload, size, number)
        image = self.stopwatch.time(self.applied.call, arguments)
        return {**image.to_json(), "computed": self.applied.computed(), **self._memory()}

    def do_held(self) -> Answer:
        """Memory reserved after emptying the allocator's cache: graph pools, fragments."""
        import torch

        assert self.applied is not None
        self._settle()
        held = 0
        if self.device.type == "cuda":
            held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return {"held_bytes": held, "summary": self.applied.summary()}

    def _settle(self) -> None:
        import torch

        from hasten.benchmark.timer import synchronize

        gc.collect()
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _memory(self) -> Answer:
        import torch

        allocated = torch.cuda.memory_allocated() if self.device.type == "cuda" else None
        return {"free_bytes": self._free(), "allocated_bytes": allocated}

    def _free(self) -> int | None:
        import torch

        if self.device.type != "cuda":
            return None
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free


def fault_of(error: BaseException) -> Answer:
    """The reply to the coordinator for an exception."""
    if isinstance(error, HastenError):
        reason = "; ".join([*error.faults, *([f"fix: {error.fix}"] if error.fix else [])])
        kind = "unsupported" if isinstance(error, UnsupportedError) else "failed"
        return {"fault": kind, "reason": reason}
    if isinstance(error, Unsupported):
        return {"fault": "unsupported", "reason": str(error)}
    kind = "out of memory" if type(error).__name__ == "OutOfMemoryError" else "failed"
    return {"fault": kind, "reason": one_line(error)}


def serve(channel: Channel, row: Row) -> None:
    """Execute commands until the coordinator closes the socket."""
    while True:
        try:
            message = channel.receive()
        except ClosedError:
            return
        command: Callable[..., Answer] = getattr(row, f"do_{message.pop('do')}")
        try:
            answer = command(**message)
        except Exception as error:
            traceback.print_exc()
            answer = fault_of(error)
        try:
            channel.send(answer)
        except ClosedError:
            return


if __name__ == "__main__":
    quiet_libraries()
    serve(Channel(socket.socket(fileno=int(sys.argv[1]))), Row())
