"""How much memory a stage takes. Linux; elsewhere nothing is known and nothing is said."""

from __future__ import annotations

import re
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

__all__ = ["PeakMemory", "status_bytes"]

INTERVAL = 0.05  # seconds between two looks


def status_bytes(field: str) -> int | None:
    """A figure of /proc/self/status in bytes: VmHWM is this program's peak of resident memory.

    Not `ru_maxrss`: of a program just started, that counts what its parent had, too.
    """
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class PeakMemory:
    """The most memory of its own (RssAnon) that this process had while it lasted, in bytes.

    Pages of files that are mapped do not count: the system takes them back when it needs them.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._stop = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        now = status_bytes("RssAnon")
        if now is not None:
            self.bytes = max(now, self.bytes or 0)
