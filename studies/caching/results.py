"""A model's results file: rows put together from the parts that jobs return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from studies.caching.methods import METHODS

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

    def add(self, part: Row, about: dict[str, Any]) -> None:
        """Put a part into its row, budget by budget: a point takes the place of an older one of its
        budget, unless nothing came of it. Each point says on what it was measured; `about` is of
        the last run."""
        here = about.get("environment", {})
        place = here.get("gpu") or here.get("cpu")
        points = [{**point, "on": place} for point in part["points"]]
        merge(self.data, {**part, "points": points}, timed=self.timed)
        budgets = {*self.data.get("budgets", []), *about.get("budgets", [])}
        self.data |= {"timed_on": place} if self.timed else about
        self.data["budgets"] = sorted(budgets, reverse=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")
        temporary.replace(self.path)


def joined(old: Row, new: Row) -> Row:
    """One row of two: points by falling budget; a reason where there are no points at all."""
    measured = {point["budget"] for point in old["points"] if point.get("setting")}
    fresh = [p for p in new["points"] if p.get("setting") or p["budget"] not in measured]
    replaced = {point["budget"] for point in fresh}
    points = [*(p for p in old["points"] if p["budget"] not in replaced), *fresh]
    points.sort(key=lambda point: -(point["budget"] or 0))
    return {**new, "points": points, "reason": None if points else new["reason"]}


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
    """Join a row with the older one of its method; a timed row only adds its seconds."""
    rows = results["rows"]
    place = next((i for i, old in enumerate(rows) if _key(old) == _key(row)), len(rows))
    if not timed:
        rows[place : place + 1] = [joined(rows[place], row) if place < len(rows) else row]
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
