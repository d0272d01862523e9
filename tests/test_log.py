"""What is logged is heard while it lasts, and the logger is as it was behind it."""

from __future__ import annotations

from hasten.log import forward_log, logger


def test_lines_and_what_goes_on_are_heard_apart() -> None:
    before = logger.level, logger.handlers[:]
    lines: list[str] = []
    now: list[str] = []
    with forward_log(lines.append, now.append):
        logger.info("%s done", "export")
        logger.debug("calibrating")
    logger.info("nobody hears this")
    assert (lines, now) == (["export done"], ["calibrating"])
    assert (logger.level, logger.handlers) == before
