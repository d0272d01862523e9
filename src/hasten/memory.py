"""How much memory there is, how much a stage takes, and bytes as people read them.

The first two are known on Linux only; elsewhere nothing is said.
"""

from __future__ import annotations

import re
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

from hasten.errors import causes

WORDS = (
    "can't allocate memory",
    "bad_alloc",
    "Cannot allocate memory",
    "Failed to allocate memory",
)
INTERVAL = 0.05  # seconds between two looks
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that a program can still have, swap included; None where that cannot be told."""
    free = _kilobytes("meminfo", "MemAvailable")
    if free is None:
        return None
    return min([free, *memory_limits()]) + (_kilobytes("meminfo", "SwapFree") or 0)


def memory_limits() -> list[int]:
    """What the control groups around this process, a container's for one, let all in them have."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            root, name = CGROUPS, "memory.max"
        elif "memory" in kinds.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root):
                limits += _number_in(group / name)
    return limits


def ran_out(error: BaseException) -> bool:
    """Whether memory was short, which torch and the libraries of engines say in their own words."""
    return any(
        isinstance(link, MemoryError)
        or type(link).__name__ == "OutOfMemoryError"  # torch's
        or any(word in str(link) for word in WORDS)
        for link in causes(error)
    )


def status_bytes(field: str) -> int | None:
    """A figure of /proc/self/status in bytes: VmHWM is this program's peak of resident memory.

    Not `ru_maxrss`: of a program just started, that counts what its parent had, too.
    """
    return _kilobytes("self/status", field)


def _kilobytes(file: str, field: str) -> int | None:
    """A line `field: N kB` of a file below /proc, in bytes."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB$", (PROC / file).read_text(), re.M)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _number_in(path: Path) -> list[int]:
    """The number that a file holds; none where it holds a word or is not there."""
    try:
        return [int(path.read_text())]
    except (OSError, ValueError):
        return []


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


def format_bytes(size: float) -> str:
    """`1.5 GiB`, `340 MiB`, `12 KiB`: the largest unit of which there is one, or the smallest."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
