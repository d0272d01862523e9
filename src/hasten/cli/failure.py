"""What a command prints when it fails: one line a fault, one line for the fix."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import typer

from hasten.errors import HastenError

# Typer may or may not bring its own copy of click; either way this is the base of usage errors.
UsageError: Any = typer.BadParameter.__base__

LESS_MEMORY = (
    'use a smaller --size, --dtype bfloat16, or a recipe with [offload] kind = "model" (GPU)'
)


class Failure(NamedTuple):
    """`exit_code` is 1 for a failure, 2 for bad usage or input, 130 for Ctrl-C."""

    faults: tuple[str, ...]
    fix: str
    exit_code: int

    def lines(self) -> list[str]:
        """The lines for stderr."""
        lines = [f"error: {_one_line(fault)}" for fault in self.faults]
        return [*lines, f"fix: {_one_line(self.fix)}"] if self.fix else lines


def explain(error: BaseException) -> Failure:
    """The failure that `error` means to someone at a terminal."""
    if isinstance(error, HastenError):
        return Failure(error.faults, error.fix, error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure(("interrupted",), "", 130)
    if isinstance(error, UsageError):
        return _usage(error)
    if _is_out_of_memory(error):
        return Failure((_with_message("out of memory", error),), LESS_MEMORY, 1)
    return Failure(
        (_with_message(f"unexpected {type(error).__name__}", error),),
        "run again with --debug for the traceback and report it",
        1,
    )


def _usage(error: Any) -> Failure:
    message = str(error.format_message()).rstrip(".")
    command = error.ctx.command_path if error.ctx else "hasten"
    return Failure((message,), f"see `{command} --help`", 2)


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError):
        return True
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # The CPU allocator of torch raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _with_message(what: str, error: BaseException) -> str:
    message = str(error).strip().partition("\n")[0]
    return f"{what}: {message}" if message else what


def _one_line(text: str) -> str:
    """Text from files and libraries, without line breaks and terminal control codes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
