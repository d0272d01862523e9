"""The optional packages of `hasten[tensorrt]`, imported when they are needed and not before."""

from __future__ import annotations

import importlib
from typing import Any

from hasten.errors import UnsupportedError

__all__ = ["needed"]


def needed(module: str) -> Any:
    """The module of this name; UnsupportedError says how to install what is not there.

    A package that is there and fails on import raises what it raises.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"the Python module {error.name} is not installed, which TensorRT export needs",
            "pip install 'hasten[tensorrt]'",
        ) from error
