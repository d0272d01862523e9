"""Input and output of a row's process, which are JSON files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from hasten.results import Role, Row, Workload

HASTEN_ENGINE = "hasten.benchmark.render"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Message):
    """One row to measure.

    Attributes:
        row: Name of the row.
        role: As in `hasten.results.Row`.
        toml: The row's recipe.
        workload: What to render.
        device: Resolved, never `auto`.
        weights: Fingerprint that the model must have, which is that of earlier rows; None if it is
            not known yet.
        images: Folder for the row's PNGs; None if they are not needed (later rounds).
        floats: Folder for the same images in float32.
        keep_floats: Whether `floats` is kept after the row.
        references: Folder of the floats of each reference row, by row name; None if there is none.
        outcome: Path of the file to write.
        force: Whether to accept a schedule learned on another model.
        engine: Name of a module with a function `load_subject(job)`.
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
    """A HastenError that would affect other rows as well.

    Attributes:
        kind: Name of the error's class.
        faults: As in `HastenError`.
        fix: As in `HastenError`.
        final: Whether it ends the benchmark in any row. Otherwise it does so only in the baseline,
            where it means that the model or the input is at fault.
    """

    kind: str
    faults: tuple[str, ...]
    fix: str
    final: bool = False


class Outcome(_Message):
    """The result of a row's process.

    Attributes:
        row: The row without its speed-up, which requires the baselines.
        weights: Fingerprint of the model's weights; None if it has none.
        refusal: An error that would affect other rows as well.
    """

    row: Row
    weights: str | None = None
    refusal: Refusal | None = None
