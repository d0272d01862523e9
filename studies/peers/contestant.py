"""A row in the race: one variant of a worker, its record and its samples."""

from __future__ import annotations

from studies.peers.record import Record, distance
from studies.peers.remote import Clock, Lost, Remote

__all__ = ["Contestant"]


class Contestant:
    """Renders timed images on demand and keeps its row up to date."""

    def __init__(self, remote: Remote, variant: str, row: Record) -> None:
        self.remote = remote
        self.variant = variant
        self.row = row

    def render(self, number: int, size: int, clock: Clock, limit: float) -> None:
        """Time image `number` at `size`. If that fails, the row records the reason."""
        what = {"number": number, "size": size, "variant": self.variant}
        try:
            sample = self.remote.ask("image", clock, limit, **what)
        except Lost as lost:
            self._lose(lost)
            return
        self.row.add(size, sample)

    def compare(self, base: Contestant, size: int) -> None:
        """Note how far the first image's final latents lie from the base's, given the same."""
        own, other = self.row.timings[size], base.row.timings[size]
        if own.samples and other.samples:
            probes = own.samples[0]["probe"], other.samples[0]["probe"]
            own.latent_distance = distance(*probes)

    def _lose(self, lost: Lost) -> None:
        """End what may still run. Measured at every size is measured, if on fewer images."""
        self.remote.end()
        if self.row.status == "ok":
            self.row.reason = f"fewer images than planned: {lost}"
        else:
            self.row.status, self.row.reason = lost.status, lost.reason
