"""A row in the race: one variant of a worker, its record and its samples."""

from __future__ import annotations

from typing import Any

from studies.peers.record import Row, distance, summarize
from studies.peers.remote import Clock, Lost, Remote

__all__ = ["Contestant"]


class Contestant:
    """Renders timed images on demand and keeps its row up to date."""

    def __init__(self, remote: Remote, variant: str, row: Row) -> None:
        self.remote = remote
        self.variant = variant
        self.row = row
        self.samples: dict[int, list[dict[str, Any]]] = {}

    def render(self, number: int, size: int, clock: Clock, limit: float) -> None:
        """Time image `number` at `size`; the row says why where that fails."""
        what = {"number": number, "size": size, "variant": self.variant}
        try:
            sample = self.remote.ask("image", clock, limit, **what)
        except Lost as lost:
            self._lose(lost)
            return
        self.samples.setdefault(size, []).append(sample)
        steps = self.remote.workload.steps
        self.row["sizes"][str(size)].update(summarize(self.samples[size], steps))
        if all(entry["seconds"] for entry in self.row["sizes"].values()):
            self.row.update(status="ok", reason=None)

    def compare(self, base: Contestant, size: int) -> None:
        """Note how far the first image's final latents lie from the base's, given the same."""
        if self.samples.get(size) and base.samples.get(size):
            found = distance(self.samples[size][0]["probe"], base.samples[size][0]["probe"])
            self.row["sizes"][str(size)]["latent_distance"] = found

    def _lose(self, lost: Lost) -> None:
        """End what may still run. Measured at every size is measured, if on fewer images."""
        self.remote.end()
        if self.row["status"] == "ok":
            self.row["reason"] = f"fewer images than planned: {lost}"
        else:
            self.row.update(status=lost.status, reason=lost.reason)
