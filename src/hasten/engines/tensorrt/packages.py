"""The optional packages of `hasten[tensorrt]`, imported when they are needed and not before."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from hasten.errors import UnsupportedError
from hasten.log import disable_telemetry

INSTALL = "pip install 'hasten[tensorrt]'"


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: it is there without a specification
        return False


def needed(module: str) -> Any:
    """Import a module; without telemetry, where it or what it imports has any.

    Raises:
        UnsupportedError: It is not installed. A package that is there and fails on import raises
            what it raises.
    """
    disable_telemetry()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"the Python module {error.name} is not installed, which TensorRT export needs",
            INSTALL,
        ) from error


def error_log(trt: Any) -> Any:
    """A logger for TensorRT that keeps its errors, one line each: its reasons are nowhere else."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(text.split()))

    return ErrorLog()
