"""What a row's process gets and what it leaves: two JSON files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from hasten.results import Role, Row, Workload

HASTEN_ENGINE = "hasten.benchmark.render"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Message):
    """One row to measure.

    Attributes:
        toml: Its recipe.
        device: Resolved, never `auto`.
        weights: Fingerprint that the model must have, because rows measured before have it; None
            where it is not known yet.
        images: Folder for its PNGs; None where the pictures are not needed (later rounds).
        floats: Folder for the same pictures unrounded, kept after the row if `keep_floats`.
        references: Row name -> folder of its floats; None where it has none.
        outcome: The file to write.
        force: Accept a schedule learned on another model.
        engine: Module with a `load_subject(job)`.
    """

    row: str
    role: Role
    toml: str
    workload: Workload
    device: str
    weights: str | None = None
    images: str | None
    floats: str
    keep_floats: bool
    references: dict[str, str | None]
    outcome: str
    force: bool = False
    engine: str = HASTEN_ENGINE


class Refusal(_Message):
    """A HastenError that other rows cannot escape either.

    Attributes:
        kind: Name of its class.
        final: It ends the benchmark, whichever row meets it; otherwise only the baseline's does,
            where the model or the input is at fault.
    """

    kind: str
    faults: tuple[str, ...]
    fix: str
    final: bool = False


class Outcome(_Message):
    """What was measured: `row` has no speed-up yet, which takes the baselines; `weights` is the
    fingerprint of the model's weights, where it has one."""

    row: Row
    weights: str | None = None
    refusal: Refusal | None = None
