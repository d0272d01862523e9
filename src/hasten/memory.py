"""Free memory, peak memory, and formatting of byte counts.

Free and peak memory are available on Linux only; elsewhere the functions return None.
"""

from __future__ import annotations

import re
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

from hasten.errors import causes

OUT_OF_MEMORY = (
    "can't allocate memory",
    "bad_alloc",
    "Cannot allocate memory",
    "Failed to allocate memory",
)
INTERVAL = 0.05  # seconds between two samples
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that a program can still allocate, including swap; None if unknown."""
    free = _kilobytes("meminfo", "MemAvailable")
    if free is None:
        return None
    return min([free, *memory_limits()]) + (_kilobytes("meminfo", "SwapFree") or 0)


def memory_limits() -> list[int]:
    """Memory limits in bytes of the control groups of this process, such as a container's."""
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
    """Whether an error or one of its causes is a lack of memory, in Python, torch or an engine."""
    return any(
        isinstance(link, MemoryError)
        or type(link).__name__ == "OutOfMemoryError"  # torch's
        or any(message in str(link) for message in OUT_OF_MEMORY)
        for link in causes(error)
    )


def status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes, such as VmHWM, the peak of resident memory.

    `ru_maxrss` is not used, because in a new process it includes its parent's memory.
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
    """The number in a file; empty if the file is missing or holds something else."""
    try:
        return [int(path.read_text())]
    except (OSError, ValueError):
        return []


class PeakMemory:
    """Context manager that measures the process's peak anonymous memory (RssAnon).

    Pages of mapped files do not count, because the system can reclaim them.

    Attributes:
        bytes: The peak so far; None if it is unknown.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._stop = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._sample()
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
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        now = status_bytes("RssAnon")
        if now is not None:
            self.bytes = max(now, self.bytes or 0)


def format_bytes(size: float) -> str:
    """Format a byte count as `1.5 GiB`, `340 MiB` or `12 KiB`."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
