"""Forwards hasten's log records: lines to keep at INFO, the current activity at DEBUG.

Records are forwarded per context, not per process. Of two threads or tasks that run at the same
time, each receives its own records, and the level of the logger `hasten` is not changed.

In hasten's own processes, irrelevant messages of libraries are silenced, such as those about
optional packages that FLUX does not need. Importing this module changes nothing.
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
    """The logger `hasten`, which also calls the sinks of the current context."""

    def log(self, level: int, msg: object, *args: Any, **options: Any) -> None:
        for line, activity in _sinks.get():
            (line if level >= logging.INFO else activity)(str(msg) % args if args else str(msg))
        super().log(level, msg, *args, **options)


logger = _Logger(logging.getLogger("hasten"), {})


@contextmanager
def forward_log(line: Callable[[str], None], activity: Callable[[str], None]) -> Iterator[None]:
    """Context manager that forwards the log messages of the current context.

    Args:
        line: Called with each message at INFO or above: lines to keep.
        activity: Called with each message at DEBUG: the current activity.
    """
    token = _sinks.set((*_sinks.get(), (line, activity)))
    try:
        yield
    finally:
        _sinks.reset(token)


VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")
"""The libraries' own settings, read when they are imported and inherited by child processes."""

# Warns about prompts that were truncated, which the user may want to shorten.
TRUNCATION_LOGGER = "diffusers.pipelines.flux.pipeline_flux"


def quiet_libraries(*, debug: bool = False) -> None:
    """Have the libraries report errors only, or with `debug` everything.

    Call this before they are imported. A verbosity that is already set in the environment is kept.
    """
    disable_telemetry()
    for name in VERBOSITY:
        os.environ.setdefault(name, "warning" if debug else "error")
    logging.getLogger(TRUNCATION_LOGGER).setLevel(logging.WARNING)


def disable_telemetry() -> None:
    """Prevent onnxruntime from contacting its vendor and from storing a device identifier.

    onnxruntime does both on import, Diffusers imports it if it is installed, and no later call can
    undo it; only the environment variable is read in time. hasten's own processes set it at the
    start, in `quiet_libraries`. Other processes set it before hasten imports either library, but
    not on `import hasten`. Child processes inherit it. A value that the user has set is kept.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


LOGGERS = (
    "torch.onnx", "torch.export", "torch.utils.cpp_extension",  # warns without a GPU on import
    "onnxscript", "onnx_ir", "modelopt", "diffusers", "transformers",
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager that suppresses warnings, stdout and the messages of `LOGGERS` below errors.

    These settings are per process, so other threads are affected as well.
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
