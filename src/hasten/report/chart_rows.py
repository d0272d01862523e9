"""Which rows a chart draws, the words next to them, and how each role looks: a hue that survives
colour blindness (Okabe and Ito, 2008) and, in charts, a shape or a hatch as well."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.report.table import QUALITY_ONLY, format_seconds, metric
from hasten.results import BASELINE_AGAIN, Results, Role, Row


@dataclass(frozen=True)
class Kind:
    key: str
    label: str
    colour: str
    hatch: str = ""


KINDS: dict[Role, Kind] = {
    "baseline": Kind("baseline", "baseline", "#767676"),
    "recipe": Kind("recipe", "recipe", "#0072B2"),
    "rival": Kind("fewer", "fewer steps, nothing cached", "#E69F00", "//"),
    "graph": Kind("quality", "graph on a CPU, for its quality only", "#CC79A7"),
    "peer": Kind("peer", "other library", "#009E73", ".."),
}


def kind_of(row: Row) -> Kind:
    return KINDS[row.role]


def present_kinds(rows: list[Row]) -> list[Kind]:
    """The kinds among `rows`, in the order of a legend."""
    roles = {row.role for row in rows}
    return [kind for role, kind in KINDS.items() if role in roles]


def drawn_rows(results: Results) -> list[Row]:
    """The rows with a speed-up, in their order; `not_drawn` lists the others."""
    return [row for row in results.rows if row.status == "ok" and row.speedup is not None]


def scored_rows(results: Results) -> list[Row]:
    """Drawn rows with an LPIPS, and the baseline, whose LPIPS to itself is 0."""
    return [
        row
        for row in drawn_rows(results)
        if row.recipe != BASELINE_AGAIN
        and (row is results.rows[0] or metric(row, "lpips").value is not None)
    ]


def facts(row: Row) -> list[str]:
    """What must not be missing where a speed-up is shown: seconds, LPIPS, a plan not calibrated."""
    measured = row.seconds_per_image
    parts = [f"{format_seconds(measured.median if measured else None)} s"]
    lpips = metric(row, "lpips")
    if lpips.value is not None:
        parts.append(f"LPIPS {lpips.text}")
    if row.calibrated is False:
        parts.append("calibrated: false")
    return parts


def not_drawn(results: Results) -> list[str]:
    return [
        f"{row.recipe}, {QUALITY_ONLY if row.role == 'graph' else f'{row.status}: {row.reason}'}"
        for row in results.rows
        if row.status != "ok" or row.role == "graph"
    ]
