"""What is logged of long work, passed on: lines at INFO, what is going on just now at DEBUG.

Who listens is a matter of the context, not of the process: of two threads or tasks that work at the
same time, each gets its own lines, and the level of the logger `hasten` stays the application's.

In processes that are hasten's own, what the libraries say unasked is silenced: optional packages
that FLUX does without, dtypes kept for no module. Nothing changes on import.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any

Sink = tuple[Callable[[str], None], Callable[[str], None]]
_sinks: ContextVar[tuple[Sink, ...]] = ContextVar("hasten_log_sinks", default=())


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """The logger `hasten`, which also calls the sinks of the context that it is called in."""

    def log(self, level: int, msg: object, *args: Any, **options: Any) -> None:
        for line, now in _sinks.get():
            (line if level >= logging.INFO else now)(str(msg) % args if args else str(msg))
        super().log(level, msg, *args, **options)


logger = _Logger(logging.getLogger("hasten"), {})


@contextmanager
def forward_log(line: Callable[[str], None], now: Callable[[str], None]) -> Iterator[None]:
    """Call `line` and `now` with what this context logs while it lasts.

    Args:
        line: Gets what is logged at INFO and above: lines to keep.
        now: Gets what is logged at DEBUG: what is going on at this moment.
    """
    token = _sinks.set((*_sinks.get(), (line, now)))
    try:
        yield
    finally:
        _sinks.reset(token)


VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")
"""The libraries' own settings, read when they are imported. Processes we start inherit them."""

# Warns of the words of a prompt that were cut off, which someone may want to shorten.
CUTS_PROMPTS = "diffusers.pipelines.flux.pipeline_flux"


def quiet_libraries(*, debug: bool = False) -> None:
    """Let the libraries report errors only, or with `debug` all they want to.

    Call it before they are imported. A verbosity that is in the environment already stays, be it
    the user's or, in a process we started, our own.
    """
    disable_telemetry()
    for name in VERBOSITY:
        os.environ.setdefault(name, "warning" if debug else "error")
    logging.getLogger(CUTS_PROMPTS).setLevel(logging.WARNING)


def disable_telemetry() -> None:
    """Keep onnxruntime from contacting its vendor and from keeping an identifier of the device.

    Importing it does both at once, Diffusers imports it wherever it is installed, and no call
    afterwards can undo that. Its environment variable is the only switch that is read in time. So
    the processes of hasten's own set it first of all, by `quiet_libraries`; in other processes it
    is set where hasten is about to import either library and not on `import hasten`. Processes
    that we start inherit it. A value that the user has set stays.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


LOGGERS = (
    "torch.onnx", "torch.export", "torch.utils.cpp_extension",  # which misses a GPU on import
    "onnxscript", "onnx_ir", "modelopt", "diffusers", "transformers",
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, nothing on stdout, and of those loggers errors only, while it lasts.

    Filters and levels are the process's: other threads are quiet too meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stdout(io.StringIO()))
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield
