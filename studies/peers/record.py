"""The measurements of a row in the race, and their conversion to rows of `results.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from studies.peers.rows import BASE
from studies.settings import settings_toml

from hasten.results import BASELINE, Role, Row, StepsComputed, summarize_quality, summarize_seconds

__all__ = ["Record", "Timing", "distance", "recipe_toml"]

GIB = 2**30
IN_TURNS = "the rows took turns, image by image"
UNSCORED = summarize_quality(BASELINE, (), "random text embeddings: pictures were not scored")


@dataclass
class Timing:
    """A row's images at one size. `warm_image_seconds` is a first image with warm compile caches;
    `latent_distance` is to the base's final latents of the same image."""

    first_image_seconds: float | None = None
    warm_image_seconds: float | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    latent_distance: float | None = None


@dataclass
class Record:
    """A row of the race at all its sizes.

    Rows of one group ran in turns, and ratios are to the base of their group. A row is measured
    where its status is "ok", and at every size with samples.
    """

    name: str
    role: Role
    timings: dict[int, Timing]
    group: int | None = None
    status: str = "stopped"
    reason: str | None = "never begun"
    settings: str | None = None
    load_seconds: float | None = None
    setup_seconds: float | None = None
    warm_setup_seconds: float | None = None
    held_bytes: int | None = None
    summary: str = ""

    @classmethod
    def new(cls, kind: str, name: str, sizes: Sequence[int]) -> Record:
        """A row without measurements."""
        roles: dict[str, Role] = {BASE: "baseline", "hasten": "recipe"}
        own_name = BASELINE if kind == BASE else name
        return cls(own_name, roles.get(kind, "peer"), {size: Timing() for size in sizes})

    def add(self, size: int, sample: dict[str, Any]) -> None:
        """Keep a timed image; a row that has one at every size is measured."""
        self.timings[size].samples.append(sample)
        if all(timing.samples for timing in self.timings.values()):
            self.status, self.reason = "ok", None

    def row(self, size: int, steps: int) -> Row:
        """The row of the results at `size`; what was measured stays, whatever came later."""
        timing = self.timings[size]
        start = {
            "setup_seconds": _sum(self.load_seconds, self.setup_seconds),
            "first_image_seconds": timing.first_image_seconds,
            "toml": self._toml(),
            "extra": _known(self._extra(timing)),
        }
        if not timing.samples:
            status = "unsupported" if self.status == "unsupported" else "failed"
            reason = self.reason if status == self.status else f"{self.status}: {self.reason}"
            return Row(recipe=self.name, role=self.role, status=status, reason=reason, **start)
        computed = [sample["computed"] for sample in timing.samples]
        loop = summarize_seconds([sample["loop_seconds"] for sample in timing.samples])
        return Row(
            recipe=self.name,
            role=self.role,
            status="ok",
            notes=tuple(self._notes(timing)),
            quality=() if self.role == "baseline" else (UNSCORED,),
            seconds_per_image=summarize_seconds([one["seconds"] for one in timing.samples]),
            transformer_ms_per_step=1000 * loop.median / steps,
            steps_computed=StepsComputed(
                mean=sum(computed) / len(computed), min=min(computed), max=max(computed)
            ),
            peak_memory_bytes=max(sample["peak_bytes"] for sample in timing.samples),
            **start,
        )

    def _toml(self) -> str | None:
        """The settings, and as comments what hasten or the peer reports it did."""
        lines = [f"# {line}".rstrip() for line in self.summary.splitlines()]
        return "\n".join([self.settings or "", *lines]) if lines else self.settings

    def _extra(self, timing: Timing) -> dict[str, float | None]:
        return {
            "load s": self.load_seconds,
            "held GiB": None if self.held_bytes is None else self.held_bytes / GIB,
            "latent distance": timing.latent_distance,
            "warm setup s": self.warm_setup_seconds,
            "warm first image s": timing.warm_image_seconds,
        }

    def _notes(self, timing: Timing) -> list[str]:
        notes = [IN_TURNS, *([self.reason] if self.reason else [])]
        finite = all(sample["finite"] for sample in timing.samples)
        return notes if finite else [*notes, "its images are not finite"]


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def recipe_toml(recipe: Mapping[str, Any]) -> str:
    """The configuration of a row as TOML: hasten's recipe, or a peer's settings."""
    others = {name: value for name, value in recipe.items() if name != "hasten.optimize"}
    own = recipe.get("hasten.optimize", "")
    if own and not any(others.values()):
        return str(own)
    return str(own) + settings_toml(others)


def distance(values: Sequence[float], base: Sequence[float]) -> float | None:
    """‖values − base‖ / ‖base‖, None where the base is zero or of another length."""
    norm = math.sqrt(math.fsum(value * value for value in base))
    if not norm or len(values) != len(base):
        return None
    gap = math.fsum((one - other) ** 2 for one, other in zip(values, base, strict=True))
    return math.sqrt(gap) / norm
