"""A model's results file: rows put together from the parts that jobs return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.caching.methods import METHODS

__all__ = ["Results", "failed_part", "joined", "merge", "settings_of"]

Row = dict[str, Any]


class Results:
    """RESULTS/MODEL.json: read at the start, written anew after every part."""

    def __init__(self, path: Path, *, timed: bool = False) -> None:
        self.path = path
        self.timed = timed
        self.data: dict[str, Any] = {"schema": 1, "rows": []}
        if path.is_file():
            self.data = json.loads(path.read_text("utf-8"))
        self.parts: dict[tuple[str, int | None], list[Row]] = {}

    def add(self, part: Row, about: dict[str, Any]) -> None:
        """Put a part into its row; a row's first part replaces what an older run had there, unless
        nothing came of it."""
        # Rows may be measured on several machines: each says where, `about` where the last one was.
        parts = self.parts.setdefault(_key(part), [])
        older = not self.timed and any(_key(row) == _key(part) for row in self.data["rows"])
        if older and not parts and not part["reason"] and not settings_in([part]):
            return
        here = about.get("environment", {})
        place = here.get("gpu") or here.get("cpu")
        parts.append({**part, "on": place})
        merge(self.data, part if self.timed else joined(parts), timed=self.timed)
        self.data |= {"timed_on": place} if self.timed else about
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")
        temporary.replace(self.path)


def joined(parts: list[Row]) -> Row:
    """One row of its parts: points by falling budget; a reason where there are no points at all."""
    points = [point for part in parts for point in part["points"]]
    reasons = [part["reason"] for part in parts if part["reason"]]
    return {
        **parts[0],
        "points": sorted(points, key=lambda point: -(point["budget"] or 0)),
        "reason": None if points else next(iter(reasons), None),
        "seconds": round(sum(part.get("seconds", 0) for part in parts), 1),
    }


def failed_part(part: Row, budgets: list[float], reason: str) -> Row:
    """A part whose job did not end well: what it has, and the reason for each budget it lacks."""
    there = {point["budget"] for point in part["points"]}
    lost = [
        {"budget": budget, "setting": None, "reason": reason}
        for budget in budgets
        if budget not in there
    ]
    if None in there:  # a recipe's one point, for whatever budget it fits
        lost = []
    return {**part, "points": [*part["points"], *lost], "reason": None}


def merge(results: dict[str, Any], row: Row, *, timed: bool) -> None:
    """Put a row in place of an older one of its method; a timed row only adds its seconds."""
    rows = results["rows"]
    place = next((i for i, old in enumerate(rows) if _key(old) == _key(row)), len(rows))
    if not timed:
        rows[place : place + 1] = [row]
        return
    for timing in row["points"]:
        for point in rows[place]["points"]:
            if str(point["budget"]) == timing["budget"]:
                point |= {name: timing[name] for name in ("seconds", "plain_seconds")}


def settings_of(results: dict[str, Any], name: str, blocks: int | None) -> dict[str, Any]:
    """Settings found so far for a method (or a recipe file), by budget."""
    recipe = name.endswith(".toml") and name not in METHODS
    key = f"recipe:{Path(name).name}" if recipe else name, blocks
    return settings_in([row for row in results["rows"] if _key(row) == key])


def settings_in(rows: list[Row]) -> dict[str, Any]:
    """Settings that have been measured, by budget."""
    points = [point for row in rows for point in row["points"]]
    return {str(point["budget"]): point["setting"] for point in points if point.get("setting")}


def _key(row: Row) -> tuple[str, int | None]:
    return row["method"], row.get("blocks")
