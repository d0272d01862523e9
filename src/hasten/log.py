"""What is logged of long work, passed on: lines at INFO, what is going on just now at DEBUG.

Who listens is a matter of the context, not of the process: of two threads or tasks that work at the
same time, each gets its own lines, and the level of the logger `hasten` stays the application's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["forward_log", "logger"]

Sink = tuple[Callable[[str], None], Callable[[str], None]]
_sinks: ContextVar[tuple[Sink, ...]] = ContextVar("hasten_log_sinks", default=())


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """The logger `hasten`, which also calls the sinks of the context that it is called in."""

    def log(self, level: int, msg: object, *args: Any, **options: Any) -> None:
        for line, now in _sinks.get():
            (line if level >= logging.INFO else now)(str(msg) % args if args else str(msg))
        super().log(level, msg, *args, **options)


logger = _Logger(logging.getLogger("hasten"), {})


@contextmanager
def forward_log(line: Callable[[str], None], now: Callable[[str], None]) -> Iterator[None]:
    """Call `line` and `now` with what this context logs while it lasts.

    Args:
        line: Gets what is logged at INFO and above: lines to keep.
        now: Gets what is logged at DEBUG: what is going on at this moment.
    """
    token = _sinks.set((*_sinks.get(), (line, now)))
    try:
        yield
    finally:
        _sinks.reset(token)
