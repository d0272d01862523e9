"""How much memory there is: what the system has free, and what a container may have of it.

Bytes in words are never "0.0 GiB".
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten import memory
from hasten.errors import EngineError
from hasten.memory import format_bytes, free_memory, memory_limits, ran_out

GIB = 2**30
MEMINFO = "MemTotal: 24684092 kB\nMemAvailable: 8388608 kB\nSwapFree: 1048576 kB\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 8 GiB free, 1 GiB of swap and no control groups."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc" / "meminfo", MEMINFO)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_is_free(system: Path) -> None:
    assert free_memory() == 9 * GIB
    assert memory_limits() == []
    write(system / "proc" / "meminfo", "MemTotal: 24684092 kB\n")  # a very old kernel
    assert free_memory() is None
    (system / "proc" / "meminfo").unlink()
    assert free_memory() is None


def test_a_container_of_the_second_version(system: Path) -> None:
    """Each group that lies around ours counts, `max` is none."""
    write(system / "proc" / "self" / "cgroup", "0::/pod/task\n")
    write(system / "cgroup" / "pod" / "task" / "memory.max", "max\n")
    write(system / "cgroup" / "pod" / "memory.max", f"{4 * GIB}\n")
    assert memory_limits() == [4 * GIB]
    assert free_memory() == 5 * GIB


def test_a_container_of_the_first_version(system: Path) -> None:
    """Its path is the host's, and what is mounted begins at the container itself."""
    write(system / "proc" / "self" / "cgroup", "9:cpu:/\n4:memory,other:/docker/123\n0::/\n")
    write(system / "cgroup" / "memory" / "memory.limit_in_bytes", f"{2 * GIB}\n")
    assert memory_limits() == [2 * GIB]
    assert free_memory() == 3 * GIB


def test_limits_beyond_what_is_free(system: Path) -> None:
    write(system / "proc" / "self" / "cgroup", "0::/\n")
    write(system / "cgroup" / "memory.max", f"{64 * GIB}\n")
    assert free_memory() == 9 * GIB


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        RuntimeError("std::bad_alloc"),
    ],
    ids=repr,
)
def test_memory_that_ran_out_behind_other_errors(error: Exception) -> None:
    outer = RuntimeError("pass 3 failed")
    outer.__cause__ = error
    assert ran_out(error)
    assert ran_out(outer)


def test_other_errors() -> None:
    assert not ran_out(EngineError("the graph is damaged", "export again"))
    assert not ran_out(OSError(28, "No space left on device"))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 KiB"),
        (700, "1 KiB"),
        (12 * 2**10, "12 KiB"),
        (26.4 * 2**20, "26 MiB"),
        (2**30, "1.0 GiB"),
        (31.42 * 2**30, "31.4 GiB"),
    ],
)
def test_the_largest_unit_of_which_there_is_one(size: float, text: str) -> None:
    assert format_bytes(size) == text
