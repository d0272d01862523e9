"""What is logged of long work, passed on: lines at INFO, what is going on just now at DEBUG."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["forward_log", "logger"]

logger = logging.getLogger("hasten")


@contextmanager
def forward_log(line: Callable[[str], None], now: Callable[[str], None]) -> Iterator[None]:
    """Call `line` and `now` with what `logger` gets while it lasts."""
    handler, level = _Forwarder(line, now), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class _Forwarder(logging.Handler):
    def __init__(self, line: Callable[[str], None], now: Callable[[str], None]) -> None:
        super().__init__()
        self.line, self.now = line, now

    def emit(self, record: logging.LogRecord) -> None:
        (self.line if record.levelno >= logging.INFO else self.now)(record.getMessage())
