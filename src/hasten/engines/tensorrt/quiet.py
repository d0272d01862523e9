"""Keep what export and calibration libraries say about their own insides from the user."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

__all__ = ["quiet"]

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
