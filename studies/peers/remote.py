"""The coordinator's side of a worker: starts it, sends commands, and ends its process group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from studies.peers.channel import Channel, ClosedError
from studies.peers.rows import Spec
from studies.peers.workload import Workload

from hasten.process import how_it_ended, python_command, python_environment

__all__ = ["Clock", "Lost", "Remote"]

MODULE = "studies.peers.worker"


class Lost(Exception):
    """A row that cannot go on: its status and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(f"{status}: {reason}")


class Clock:
    """Seconds since the start, and how many are left of the deadline."""

    def __init__(self, deadline: float | None = None) -> None:
        self.start = monotonic()
        self.deadline = deadline

    def spent(self) -> float:
        return monotonic() - self.start

    def left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - self.spent()


class Remote:
    """A row's process. Its compile caches are in `caches`: empty ones make a cold start."""

    def __init__(self, spec: Spec, workload: Workload, caches: Path, log: Path) -> None:
        self.spec = spec
        self.workload = workload
        self.caches = caches
        self.log = log
        self.lost: Lost | None = None
        ours, theirs = socket.socketpair()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                python_command(MODULE, str(theirs.fileno())),
                env=_environment(caches),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # to end it with its compile workers; Ctrl-C reaches only us
            )
        theirs.close()
        self.channel = Channel(ours)

    def tell(self, command: str, **what: Any) -> None:
        """Send a command without waiting; `answer` returns its result or raises its error."""
        with suppress(ClosedError):
            self.channel.send({"do": command, **what})

    def answer(self, clock: Clock, limit: float) -> dict[str, Any]:
        """What the last command measured. Raises Lost, and stays `lost`, where that is a fault,
        does not come in `limit` seconds or before the deadline, or never."""
        if self.lost is None:
            try:
                return self._received(clock, limit)
            except Lost as lost:
                self.lost = lost
        raise self.lost

    def ask(self, command: str, clock: Clock, limit: float, **what: Any) -> dict[str, Any]:
        """The answer to a command."""
        self.tell(command, **what)
        return self.answer(clock, limit)

    def end(self) -> None:
        """Kill the process and its group. Further calls have no effect."""
        if self.process.returncode is not None:
            return
        self.channel.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _received(self, clock: Clock, limit: float) -> dict[str, Any]:
        left = clock.left()
        try:
            answer = self.channel.receive(min(left, limit))
        except TimeoutError:
            if left <= limit:
                raise Lost("stopped", "the deadline came") from None
            raise Lost("too slow", f"no answer in {limit:.0f} s") from None
        except ClosedError:
            raise Lost("failed", self._ending()) from None
        if "fault" in answer:
            raise Lost(answer["fault"], answer["reason"])
        return answer

    def _ending(self) -> str:
        for _ in range(50):
            if (status := self._status()) is not None:
                return f"{how_it_ended(status)}; see {self.log.name}"
            sleep(0.1)
        return f"it closed its connection; see {self.log.name}"

    def _status(self) -> int | None:
        """How the process ended, without reaping it: its group is still to be ended."""
        done = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if done is None:
            return None
        return done.si_status if done.si_code == os.CLD_EXITED else -done.si_status


def _environment(caches: Path) -> dict[str, str]:
    return {
        **python_environment(),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TOKENIZERS_PARALLELISM": "false",
    }
