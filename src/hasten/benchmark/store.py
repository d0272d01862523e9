"""The folder a benchmark writes: what lies where, what is an earlier benchmark's, what is done.

results.json  table.md  speedup.png  report.html
images/ROW/000.png      8-bit pictures of the first round
rows/ROW.json           a finished row and what it was measured with (ROW@2: second round)
logs/ROW.log            what the row's process printed
.bench.json             rows and numbers of pictures this folder's benchmarks have begun
.work/                  jobs, and unrounded pictures of references; gone at the end
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hasten.atomic import write_text
from hasten.benchmark.rows import PlannedRow
from hasten.errors import InputError
from hasten.results import Environment, Row, Workload

__all__ = ["Identity", "Store"]

MANIFEST = ".bench.json"
REPORT = ("results.json", "table.md", "speedup.png", "report.html")
FOLDERS = ("images", "rows", "logs", ".work")
COMPARED = ("device", "gpu", "cpu", "torch", "diffusers", "transformers", "hasten")


class Identity(BaseModel):
    """What a row was measured with; rows with different ones do not belong in one table."""

    workload: dict[str, Any]
    environment: dict[str, Any]
    references: list[str]
    recipe: str

    @classmethod
    def of(
        cls,
        workload: Workload,
        environment: Environment,
        references: Sequence[str],
        planned: PlannedRow,
    ) -> Identity:
        return cls(
            workload=workload.model_dump(mode="json", exclude={"rounds"}),
            environment=environment.model_dump(mode="json", include=set(COMPARED)),
            references=list(references),
            recipe=planned.recipe.to_toml(),
        )

    def differences(self, now: Identity) -> list[str]:
        """One line for each thing that `now` has otherwise."""
        lines = []
        for table in ("workload", "environment"):
            then = getattr(self, table)
            for key, value in getattr(now, table).items():
                if then.get(key) != value:
                    lines.append(_changed(key, then.get(key), value))
        if self.references != now.references:
            lines.append(_changed("references", self.references, now.references))
        return lines


class _Finished(BaseModel):
    identity: Identity
    row: Row


class _Manifest(BaseModel):
    rows: list[str] = []
    prompts: int = 0
    rounds: int = 1


@dataclass(frozen=True)
class Store:
    """The output folder; nothing is touched before `open`."""

    out: Path

    def check(self) -> None:
        """Raise InputError unless `out` can be made and written, and holds nothing foreign that
        a benchmark would replace. Writes nothing."""
        existing = next(folder for folder in (self.out, *self.out.parents) if folder.exists())
        if not existing.is_dir():
            raise InputError(f"{existing}: a file, not a folder", "choose another --out")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"{existing}: cannot be written", "choose another --out")
        if not (self.out / MANIFEST).exists():
            foreign = [name for name in (*REPORT, *FOLDERS) if (self.out / name).exists()]
            if foreign:
                raise InputError(
                    f"{self.out}: there is {', '.join(foreign)} that no benchmark here wrote",
                    "choose another --out, or move them away",
                )

    def open(self, rows: Sequence[PlannedRow], workload: Workload, *, resume: bool) -> None:
        """Make the folders; without `resume`, first delete what earlier benchmarks wrote."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.out}: {error.strerror}", "choose another --out") from None
        before = self._manifest()
        if not resume:
            self._delete(before)
            before = _Manifest()
        manifest = _Manifest(
            rows=list(dict.fromkeys([*before.rows, *(row.name for row in rows)])),
            prompts=max(before.prompts, len(workload.prompts)),
            rounds=max(before.rounds, workload.rounds),
        )
        write_text(self.out / MANIFEST, manifest.model_dump_json())
        for folder in FOLDERS:
            (self.out / folder).mkdir(exist_ok=True)

    def row_file(self, name: str, turn: int) -> Path:
        """Where a row of round `turn` (0 is the first) is kept; @ is in no recipe's name."""
        return self.out / "rows" / f"{_stem(name, turn)}.json"

    def log_file(self, name: str, turn: int) -> Path:
        return self.out / "logs" / f"{_stem(name, turn)}.log"

    def work_file(self, name: str, turn: int, kind: str) -> Path:
        return self.out / ".work" / f"{_stem(name, turn)}.{kind}.json"

    def images(self, name: str) -> Path:
        return self.out / "images" / name

    def floats(self, name: str) -> Path:
        return self.out / ".work" / name

    def write_row(self, row: Row, turn: int, identity: Identity) -> None:
        finished = _Finished(identity=identity, row=row)
        write_text(self.row_file(row.recipe, turn), finished.model_dump_json(indent=1))

    def finished_row(self, planned: PlannedRow, turn: int, identity: Identity) -> Row | None:
        """The row if it was measured before and is ok; InputError names what it differs in."""
        try:
            text = self.row_file(planned.name, turn).read_text("utf-8")
            finished = _Finished.model_validate(json.loads(text))
        except (OSError, ValueError, ValidationError):
            return None  # never begun, or not written whole: measure it
        differences = finished.identity.differences(identity)
        if finished.identity.recipe != identity.recipe:
            differences.append(f"recipe {planned.name!r} has changed since")
        if differences:
            raise InputError(
                [f"{self.out}: cannot resume: {line}" for line in differences],
                "choose another --out, or leave out --resume to start anew",
            )
        return finished.row if finished.row.status == "ok" else None

    def has_floats(self, name: str, workload: Workload) -> bool:
        """Whether a reference's unrounded pictures are all still there."""
        return all(
            (self.floats(name) / f"{prompt.id:03d}.safetensors").exists()
            for prompt in workload.prompts
        )

    def close(self) -> None:
        shutil.rmtree(self.out / ".work", ignore_errors=True)

    def _manifest(self) -> _Manifest:
        try:
            return _Manifest.model_validate(json.loads((self.out / MANIFEST).read_text("utf-8")))
        except (OSError, ValueError, ValidationError):
            return _Manifest()

    def _delete(self, before: _Manifest) -> None:
        for name in REPORT if before.rows else ():
            (self.out / name).unlink(missing_ok=True)
        for row in before.rows:
            for turn in range(before.rounds):
                self.row_file(row, turn).unlink(missing_ok=True)
                self.log_file(row, turn).unlink(missing_ok=True)
            pictures = self.images(row)
            for prompt in range(before.prompts):
                (pictures / f"{prompt:03d}.png").unlink(missing_ok=True)
            _remove_if_empty(pictures)
        shutil.rmtree(self.out / ".work", ignore_errors=True)
        for folder in FOLDERS:
            _remove_if_empty(self.out / folder)


def _stem(name: str, turn: int) -> str:
    return f"{name}@{turn + 1}" if turn else name


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _changed(key: str, then: Any, now: Any) -> str:
    if key == "prompts":
        return "the prompts are others"
    return f"{key} was {then}, now is {now}"
