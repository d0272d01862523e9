"""Processes at a time, deadlines, and what is told of each task."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
from studies.caching.pool import run_all


class Child:
    """A process as multiprocessing has it: a sentinel that turns readable when it ends."""

    def __init__(self, code: str) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert self.child.stdout is not None
        self.sentinel = self.child.stdout

    def join(self) -> None:
        self.child.wait()

    def kill(self) -> None:
        self.child.kill()

    @property
    def exitcode(self) -> int:
        return self.child.returncode


def test_every_task_runs_and_its_exit_status_is_told() -> None:
    def start(code: int) -> Any:
        return Child(f"raise SystemExit({code})")

    ended = {one.task: one.code for one in run_all([0, 3, 5], 2, start)}
    assert ended == {0: 0, 3: 3, 5: 5}


def test_no_more_run_than_there_are_slots() -> None:
    running: list[Child] = []
    most = 0

    def start(task: int) -> Any:
        nonlocal most
        running.append(Child("import time; time.sleep(0.05)"))
        most = max(most, sum(child.child.poll() is None for child in running))
        return running[-1]

    assert len([*run_all(range(5), 2, start)]) == 5
    assert most <= 2


def test_at_the_deadline_the_running_are_killed_and_the_rest_not_begun() -> None:
    children: list[Child] = []

    def start(task: str) -> Any:
        children.append(Child("" if task == "quick" else "import time; time.sleep(60)"))
        return children[-1]

    begun = time.time()
    ended = [*run_all(["quick", "long", "never"], 1, start, deadline=begun + 1)]
    assert time.time() - begun < 20
    assert [(one.task, one.stopped) for one in ended] == [
        ("quick", None),
        ("long", "stopped at the deadline"),
        ("never", "not begun before the deadline"),
    ]
    assert children[1].child.wait(timeout=10) != 0


def test_what_runs_is_killed_when_the_caller_gives_up() -> None:
    child = Child("import time; time.sleep(60)")

    def start(task: int) -> Any:
        if task:
            raise KeyboardInterrupt
        return child

    with pytest.raises(KeyboardInterrupt):
        list(run_all([0, 1], 2, start))
    assert child.child.wait(timeout=10) != 0
