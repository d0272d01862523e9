"""Prepares a row in a worker: builds it and warms it up at every size, with the seconds taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple

from studies.peers.record import Record, recipe_toml
from studies.peers.remote import Clock, Lost, Remote

__all__ = ["Room", "prepare"]

WARM_UP = 1_000_000  # images before the timed ones have numbers from here on
BUILD_SECONDS = 300.0
TOO_SLOW = "too slow to set up"


class Room(NamedTuple):
    """Bytes free on the device before the row was built, with its weights there as they were
    loaded, and once it is warm; None on a CPU."""

    before: int | None
    loaded: int | None
    after: int | None


def prepare(
    remote: Remote, rows: Sequence[Record], clock: Clock, limit: float, save: Callable[[], None]
) -> Room:
    """Build, apply, and the first image at every size, noted in `rows`, one for each variant.

    limit: seconds from weights on the device to the last of those images. The rows' process is
    shared: what it took to start stands in the first of them. Raises Lost.
    """
    built = remote.ask("build", clock, BUILD_SECONDS)
    rows[0].load_seconds = built["load_seconds"]
    start = monotonic()
    try:
        applied = remote.ask("apply", clock, limit)
        _note(rows, remote.spec.variants, applied)
        save()
        after = None
        for place, size in enumerate(remote.workload.sizes):
            left = limit - (monotonic() - start)
            what = {"number": WARM_UP + place, "size": size, "variant": remote.spec.variants[0]}
            image = remote.ask("image", clock, left, **what)
            rows[0].timings[size].first_image_seconds = image["seconds"]
            after = image["free_bytes"]
            save()
    except Lost as lost:
        if lost.status != "too slow":
            raise
        raise Lost(TOO_SLOW, f"given up {monotonic() - start:.0f} s after loading") from None
    return Room(built["free_before"], built["free_bytes"], after)


def _note(rows: Sequence[Record], variants: Sequence[str], applied: dict[str, Any]) -> None:
    rows[0].setup_seconds = applied["setup_seconds"]
    for row, variant in zip(rows, variants, strict=True):
        asked = {**applied["recipe"], **({"variant": variant} if variant else {})}
        row.settings = recipe_toml(asked)
