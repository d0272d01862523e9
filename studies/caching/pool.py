"""Runs a limited number of processes at a time, until all have ended or a deadline has passed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["Ended", "run_all"]

Task = TypeVar("Task")


class Ended(NamedTuple, Generic[Task]):
    """A task and how it ended: an exit status (−N: signal N), or why it was not let run on."""

    task: Task
    code: int | None
    stopped: str | None = None


def run_all(
    tasks: Sequence[Task],
    slots: int,
    start: Callable[[Task], Any],
    deadline: float | None = None,
) -> Iterator[Ended[Task]]:
    """Run the tasks in order, at most `slots` at a time; each is yielded as it ends.

    `start(task)` begins one and returns its process. At `deadline` (seconds since 1970) what runs
    is killed and the rest is not begun. Leaving the iterator kills what runs.
    """
    waiting = deque(tasks)
    running: dict[Any, tuple[Any, Task]] = {}
    try:
        while waiting or running:
            left = None if deadline is None else deadline - time.time()
            if left is not None and left <= 0:
                break
            while waiting and len(running) < slots:
                process = start(waiting[0])
                running[process.sentinel] = (process, waiting.popleft())
            for sentinel in wait([*running], left):
                process, task = running.pop(sentinel)
                process.join()
                yield Ended(task, process.exitcode)
    finally:
        for process, _ in running.values():
            process.kill()
    for _, task in running.values():
        yield Ended(task, None, "stopped at the deadline")
    for task in waiting:
        yield Ended(task, None, "not begun before the deadline")
