"""Benchmarks of several recipes on the same prompts: times, memory and image quality.

Each row runs in its own process. Neither this package nor `bench` imports torch; only the processes
that `bench` starts do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.benchmark.run import bench

__all__ = ["bench"]


def __getattr__(name: str) -> Any:
    # On first use, because modules of this package are also run as programs.
    if name != "bench":
        raise AttributeError(f"module 'hasten.benchmark' has no attribute {name!r}")
    from hasten.benchmark.run import bench

    return bench
