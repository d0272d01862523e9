"""Put torch's functions back after Model Optimizer has run a model.

It replaces functions of torch while a module runs, and leaves them replaced where the module
raises. Everything in the process would then go through a quantiser that no longer means anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional

__all__ = ["functions_restored"]


@contextmanager
def functions_restored() -> Iterator[None]:
    """The functions of torch and torch.nn.functional are afterwards what they were before."""
    before = [(module, dict(vars(module))) for module in (torch, functional)]
    try:
        yield
    finally:
        for module, functions in before:
            for name, function in functions.items():
                if callable(function) and vars(module).get(name) is not function:
                    setattr(module, name, function)
                    if f"_{name}" not in functions:  # where it keeps the original
                        vars(module).pop(f"_{name}", None)
