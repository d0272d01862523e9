"""What a command prints when it fails: one line a fault, one line for the fix."""

from __future__ import annotations

from typing import Any, NamedTuple

import typer

from hasten.errors import HastenError, Part
from hasten.memory import ran_out

# Typer may or may not bring its own copy of click; either way this is the base of usage errors.
UsageError: Any = typer.BadParameter.__base__

LESS_MEMORY = (
    'use a smaller --size, --dtype bfloat16, or a recipe with [offload] kind = "model" (GPU)'
)


class Failure(NamedTuple):
    """`exit_code` is 1 for a failure, 2 for bad usage or input, 130 for Ctrl-C."""

    parts: tuple[Part, ...]
    exit_code: int

    def lines(self) -> list[str]:
        """The lines for stderr."""
        return [_one_line(line) for part in self.parts for line in part.lines("error: ")]


def explain(error: BaseException) -> Failure:
    """The failure that `error` means to someone at a terminal."""
    if isinstance(error, HastenError):
        return Failure(error.parts, error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return _failure("interrupted", str(error), 130)
    if isinstance(error, UsageError):
        return _usage(error)
    if ran_out(error):
        return _failure(_with_message("out of memory", error), LESS_MEMORY, 1)
    return _failure(
        _with_message(f"unexpected {type(error).__name__}", error),
        "run again with --debug for the traceback and report it",
        1,
    )


def _failure(fault: str, fix: str, exit_code: int) -> Failure:
    return Failure((Part((fault,), fix),), exit_code)


def _usage(error: Any) -> Failure:
    message = str(error.format_message()).rstrip(".")
    command = error.ctx.command_path if error.ctx else "hasten"
    return _failure(message, f"see `{command} --help`", 2)


def _with_message(what: str, error: BaseException) -> str:
    message = str(error).strip().partition("\n")[0]
    return f"{what}: {message}" if message else what


def _one_line(text: str) -> str:
    """Text from files and libraries, without line breaks and terminal control codes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
