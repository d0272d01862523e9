"""What an export is made of: `manifest.json` beside the files it lists. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hasten.atomic import write_text
from hasten.engines.tensorrt.hashes import facts_of_file
from hasten.engines.tensorrt.targets import Precision
from hasten.engines.tensorrt.verification import Verification
from hasten.errors import InputError

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "Calibration",
    "FileEntry",
    "Manifest",
    "Stage",
    "Tokens",
]

MANIFEST = "manifest.json"
SCHEMA: Literal[1] = 1

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Record):
    """Size in bytes and sha256 of a file of the export."""

    bytes: Count
    sha256: Sha256


class Stage(_Record):
    """Seconds that it took when it was made, its peak of memory where that is known, and whether
    this export found it made already."""

    name: str
    seconds: Annotated[float, Field(ge=0)]
    peak_bytes: Count | None
    cached: bool


class Tokens(_Record):
    """Text tokens of every call; image tokens at least, at best and at most."""

    text: Positive
    least: Positive
    best: Positive
    most: Positive


class Calibration(_Record):
    """How the scales of FP8 were found."""

    method: str
    prompts: Positive
    steps: Positive
    sha256: Sha256


class Manifest(_Record):
    """What was exported, from what, how, and how well the graph was found to agree with torch.

    weights: sha256 over all tensors of the transformer. channels, text_dim, row_width, head_dim:
    the graph's fixed sizes. targets: empty where only the graph was made. verification: what
    `hasten.engines.tensorrt.verify` found, None where it was left out. folder: where it was read
    from; not part of the file.
    """

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    hasten: str
    model: str
    family: str
    weights: Sha256
    precision: Precision
    targets: tuple[str, ...]
    shapes: Tokens
    channels: Positive
    text_dim: Positive
    row_width: Positive
    head_dim: Positive
    calibration: Calibration | None
    files: dict[str, FileEntry]
    stages: tuple[Stage, ...]
    verification: Verification | None
    versions: dict[str, str | None]
    folder: Path | None = Field(default=None, exclude=True)

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_text(path, self.text())

    def text(self) -> str:
        """What is written."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in a folder; InputError where there is none or it cannot be understood.

        The files that it lists are not looked at: see `damaged`.
        """
        path = folder / MANIFEST
        again = f"delete the folder, then `hasten export tensorrt --out {folder}`"
        try:
            found = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{folder}: no {MANIFEST}, so no export is there",
                f"check the path, or export there: `hasten export tensorrt --out {folder}`",
            ) from None
        except NotADirectoryError:
            raise InputError(
                f"{folder}: a file, not the folder of an export", "check the path"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {_first_line(error)}", again) from None
        version = found.get("schema") if isinstance(found, Mapping) else None
        if version != SCHEMA:
            raise InputError(
                f"{path}: its schema is {version!r}, this hasten reads {SCHEMA}", again
            )
        try:
            return cls.model_validate({**found, "folder": folder})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: {where}: {first['msg']}", again) from None

    def other_size(self, folder: Path) -> dict[str, str]:
        """Its files that are missing from a folder or of another size, by name, and why: `missing`
        or `damaged`. Reads none."""
        found = {name: _fault_of_size(folder / name, entry) for name, entry in self.files.items()}
        return {name: fault for name, fault in found.items() if fault is not None}

    def damaged(self, folder: Path) -> dict[str, str]:
        """Its files that are not in a folder as they were, by name, and why: `missing` or
        `damaged`. Reads all of them."""
        found = {name: _fault(folder / name, entry) for name, entry in self.files.items()}
        return {name: fault for name, fault in found.items() if fault is not None}


def _fault(path: Path, entry: FileEntry) -> str | None:
    if fault := _fault_of_size(path, entry):
        return fault
    try:
        return None if facts_of_file(path).sha256 == entry.sha256 else "damaged"
    except OSError:  # it cannot be read, or is a folder
        return "damaged"


def _fault_of_size(path: Path, entry: FileEntry) -> str | None:
    try:
        return None if path.stat().st_size == entry.bytes else "damaged"
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "damaged"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
