"""What is logged reaches who listens in the same context, and nobody else."""

from __future__ import annotations

import logging
import threading

import pytest

from hasten.log import forward_log, logger


def test_lines_and_what_goes_on_are_passed_on_apart() -> None:
    lines: list[str] = []
    now: list[str] = []
    with forward_log(lines.append, now.append):
        logger.info("%s done", "export")
        logger.debug("100 %")
    logger.info("nobody listens")
    assert (lines, now) == (["export done"], ["100 %"])


def test_two_threads_get_their_own_lines() -> None:
    lines: dict[str, list[str]] = {"a": [], "b": []}
    together = threading.Barrier(2)

    def work(name: str) -> None:
        with forward_log(lines[name].append, lines[name].append):
            for number in range(20):
                together.wait()
                logger.info("%s %d", name, number)

    threads = [threading.Thread(target=work, args=(name,)) for name in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines == {name: [f"{name} {number}" for number in range(20)] for name in lines}


def test_the_application_decides_what_its_handlers_get(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogger("hasten").level
    with forward_log(lambda _line: None, lambda _now: None):
        logger.info("a detail")
        assert logging.getLogger("hasten").level == before
        with caplog.at_level(logging.INFO, "hasten"):
            logger.info("wanted")
            logger.debug("not wanted")
    assert [record.getMessage() for record in caplog.records] == ["wanted"]
