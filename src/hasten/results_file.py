"""Reads and writes `results.json`; files of schema 1 are upgraded when they are read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from hasten.atomic import write_text
from hasten.errors import InputError, writing
from hasten.results import (
    BASELINE,
    BASELINE_AGAIN,
    SCHEMA_VERSION,
    Environment,
    Results,
    Row,
    Workload,
    with_speedups,
)
from hasten.sealed import DamagedError, parse_json
from hasten.user_files import read_text

FIX_CONTENT = "write the file with `hasten bench`, or correct the fields named above"
FIX_PATH = "give a results.json that `hasten bench` wrote"
RIVAL = re.compile(r'^description = "(.+) without its cache, in \d+ steps"$', re.MULTILINE)


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read and check a results file.

    Args:
        path: A `results.json` of this version or an earlier one. The speed-ups of a file of schema
            1 are recomputed relative to both baselines.

    Raises:
        InputError: The file cannot be read, is not a results file, or is inconsistent; one line
            per fault.
    """
    path = Path(path)
    data = _json_in(path)
    version = data.get("schema") if isinstance(data, dict) else None
    if version is None:
        raise InputError(f"{path}: not a results file: it has no schema version", FIX_PATH)
    if type(version) is not int or version not in (1, SCHEMA_VERSION):
        raise InputError(
            f"{path}: schema {version!r} is unknown; this version reads 1 and {SCHEMA_VERSION}",
            "run the benchmark again with this version, or install the version that wrote it",
        )
    # Strict JSON validation reads lists as tuples, which strict Python validation refuses.
    try:
        if version == SCHEMA_VERSION:
            return Results.model_validate_json(json.dumps(data), strict=True)
        del data["schema"]
        first = _FirstVersion.model_validate_json(json.dumps(_upgraded(data)), strict=True)
        return with_speedups(first.workload, first.environment, first.rows)
    except ValidationError as error:
        faults = [f"{path}: {_described(fault)}" for fault in error.errors()]
        raise InputError(faults, FIX_CONTENT) from None


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write `results` atomically: readers see the old file or the complete new one.

    Args:
        path: The file to create or replace; its folder must exist.
        results: What to write.

    Raises:
        InputError: The file cannot be written, or a value is NaN or infinite.
    """
    path = Path(path)
    data = results.model_dump(mode="python", by_alias=True)
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(
            f"{path}: not written: {error}", "record values that were not measured as null"
        ) from None
    with writing(path, "choose a directory that exists and has free space"):
        write_text(path, text + "\n")


def _json_in(path: Path) -> Any:
    if path.exists() and not path.is_file():  # a pipe or a device would never end
        raise InputError(f"{path}: not a regular file", FIX_PATH)
    try:
        return parse_json(read_text(path, "results file", FIX_PATH))
    except DamagedError as error:
        raise InputError(f"{path}: not JSON: {error}", FIX_PATH) from None


def _described(fault: ErrorDetails) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    message = " ".join(fault["msg"].removeprefix("Value error, ").split())
    return f"{where.removeprefix('.')}: {message}" if where else message


class _FirstVersion(BaseModel):
    """Results of schema 1. Its speed-ups, relative to the first baseline only, are recomputed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workload: Workload
    environment: Environment
    rows: tuple[Row, ...] = Field(min_length=1)


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 with the roles of schema 2, which are derived only here."""
    rows = data.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return data  # the models report what is wrong
    return {**data, "rows": [_with_role(row, rows) for row in rows]}


def _with_role(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of schema 1 with its role; `peer` becomes a note.

    A rival is identified by the description that hasten wrote in its recipe, not by its name.
    """
    kept = {key: value for key, value in row.items() if key not in ("peer", "quality_only")}
    described = RIVAL.search(str(row.get("toml")))
    names = [other.get("recipe") for other in rows]
    rival_of = [described[1]] if described and described[1] in names else []
    role = "rival" if rival_of else "recipe"
    if row.get("recipe") in (BASELINE, BASELINE_AGAIN):
        role = "baseline"
    elif row.get("quality_only"):
        role = "graph"
    elif row.get("peer"):
        role = "peer"
        notes = row.get("notes", [])
        kept["notes"] = [str(row["peer"]), *notes] if isinstance(notes, list) else notes
    return {**kept, "role": role, "rival_of": rival_of}
