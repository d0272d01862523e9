"""What a row makes of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Applied", "Unsupported", "nothing", "one_line"]


class Unsupported(Exception):
    """This row cannot run on this machine or model; the message says why."""


def nothing(_: str) -> None:
    """A row of one variant has nothing to switch."""


@dataclass(frozen=True)
class Applied:
    """call: like the pipeline; computed: steps that the last call computed in full.

    recipe: everything that was asked of the peer, as text and numbers. select: switches to another
    of the row's variants, outside of any timing. summary: what hasten or the peer says it did.
    """

    call: Callable[..., Any]
    computed: Callable[[], int]
    recipe: dict[str, Any]
    select: Callable[[str], None] = nothing
    summary: Callable[[], str] = field(default=str)


def one_line(error: BaseException) -> str:
    """The first line of an exception, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
