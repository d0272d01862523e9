"""The same prompts through several recipes: timed, scored, each row in its own process.

No torch here, nor in `bench` itself: only in the processes it starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.benchmark.run import bench

__all__ = ["bench"]


def __getattr__(name: str) -> Any:
    # On first use: the modules of this package are programs too, and start without the rest.
    if name != "bench":
        raise AttributeError(f"module 'hasten.benchmark' has no attribute {name!r}")
    from hasten.benchmark.run import bench

    return bench
