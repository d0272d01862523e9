"""What a chart draws of the results, and the words beside it."""

from __future__ import annotations

from hasten.report import numbers
from hasten.report.table import QUALITY_ONLY, metric
from hasten.results import BASELINE_AGAIN, Results, Row


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
    parts = [f"{numbers.seconds(measured.median if measured else None)} s"]
    lpips = metric(row, "lpips")
    if lpips.value is not None:
        parts.append(f"LPIPS {lpips.text}")
    if row.calibrated is False:
        parts.append("calibrated: false")
    return parts


def not_drawn(results: Results) -> list[str]:
    return [
        f"{row.recipe}, {QUALITY_ONLY if row.quality_only else f'{row.status}: {row.reason}'}"
        for row in results.rows
        if row.status != "ok" or row.quality_only
    ]
