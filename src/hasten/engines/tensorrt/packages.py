"""The optional packages of `hasten[tensorrt]`, imported only when they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from hasten.errors import UnsupportedError
from hasten.log import disable_telemetry

INSTALL = "pip install 'hasten[tensorrt]'"


def is_installed(module: str) -> bool:
    """Whether a module is installed; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: it is loaded but has no spec
        return False


def needed(module: str) -> Any:
    """Import a module with the telemetry of its dependencies disabled.

    Other errors of the import are not changed.

    Raises:
        UnsupportedError: The module is not installed.
    """
    disable_telemetry()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"the Python module {error.name} is not installed, and TensorRT export needs it",
            INSTALL,
        ) from error


def error_log(trt: Any) -> Any:
    """A TensorRT logger that collects errors, one line each; they are reported only there."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(text.split()))

    return ErrorLog()
