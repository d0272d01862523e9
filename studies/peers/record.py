"""What is kept of a row: plain data, written as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hasten.results import summarize_seconds

__all__ = ["distance", "new_row", "refused", "summarize"]

Row = dict[str, Any]


def new_row(name: str, package: str, group: int | None, sizes: Sequence[int]) -> Row:
    """A row before anything is known of it.

    group: rows of one group ran in turns; a row's ratios are to the base of its own group.
    """
    return {
        "row": name,
        "package": package,
        "group": group,
        "status": "stopped",
        "reason": "never begun",
        "recipe": None,
        "summary": None,
        "load_seconds": None,
        "setup_seconds": None,
        "allocated_bytes": None,
        "held_bytes": None,
        "sizes": {str(size): _new_size() for size in sizes},
        "warm_start": None,
    }


def _new_size() -> Row:
    return {
        "first_image_seconds": None,
        "seconds": None,
        "loop_seconds": None,
        "ms_per_step": None,
        "computed": None,
        "peak_bytes": None,
        "latent_distance": None,
        "finite": None,
    }


def refused(row: Row, status: str, reason: str) -> None:
    """The row did not get so far; what it measured before stays."""
    row["status"], row["reason"] = status, reason


def summarize(samples: Sequence[dict[str, Any]], steps: int) -> Row:
    """What a size's entry says of its timed images (at least one)."""
    loops = [sample["loop_seconds"] for sample in samples]
    loop = summarize_seconds(loops)
    return {
        "seconds": summarize_seconds([sample["seconds"] for sample in samples]).model_dump(),
        "loop_seconds": loop.model_dump(),
        "ms_per_step": 1000 * loop.median / steps,
        "computed": samples[-1]["computed"],
        "peak_bytes": max(sample["peak_bytes"] for sample in samples),
        "finite": all(sample["finite"] for sample in samples),
    }


def distance(values: Sequence[float], base: Sequence[float]) -> float | None:
    """‖values − base‖ / ‖base‖, None where the base is zero or of another length."""
    norm = math.sqrt(math.fsum(value * value for value in base))
    if not norm or len(values) != len(base):
        return None
    gap = math.fsum((one - other) ** 2 for one, other in zip(values, base, strict=True))
    return math.sqrt(gap) / norm
