"""What the libraries say unasked, silenced in processes that are hasten's own; nothing on import.

Optional packages that FLUX does without, dtypes kept for no module: nothing that whoever runs a
command could act on.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

__all__ = ["VERBOSITY", "disable_telemetry", "quiet", "quiet_libraries"]

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
    "onnxscript", "onnx_ir", "modelopt", "transformers",
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
