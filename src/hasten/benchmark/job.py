"""What a row's process is told, and what it answers: two JSON files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from hasten.results import Row, Workload

__all__ = ["HASTEN_ENGINE", "Job", "Outcome", "Refusal"]

HASTEN_ENGINE = "hasten.benchmark.subject"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Message):
    """One row to measure.

    toml: its recipe. device: resolved, never `auto`. images: folder for its PNGs, None where the
    pictures are not wanted again (later rounds). floats: folder for the same pictures unrounded,
    kept when the row is done if `keep_floats`. references: row name -> folder of its floats, None
    where it has none. outcome: the file to write. force: accept a schedule learned on another
    model. engine: module with a `load(job)`.
    """

    row: str
    toml: str
    workload: Workload
    device: str
    images: str | None
    floats: str
    keep_floats: bool
    references: dict[str, str | None]
    outcome: str
    force: bool = False
    engine: str = HASTEN_ENGINE


class Refusal(_Message):
    """A HastenError that no other row can escape either: the model or the input is at fault."""

    kind: str
    faults: tuple[str, ...]
    fix: str


class Outcome(_Message):
    """`row` has no speed-up yet and no image paths: the parent knows the rest."""

    row: Row
    refusal: Refusal | None = None
