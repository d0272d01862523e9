"""The two inline SVG charts: which rows they draw, how each role looks, geometry in CSS pixels.

Each role has a hue that survives colour blindness (Okabe and Ito, 2008) and a shape or a hatch as
well. The template only writes the geometry down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from hasten.report.table import MISSING, QUALITY_ONLY, format_seconds, metric, speedup
from hasten.results import BASELINE_AGAIN, Results, Role, Row

WIDE, NARROW = 560, 330
CHARACTER = 6.6  # mean advance of the 12 px label font, rounded up


@dataclass(frozen=True)
class Tick:
    position: float
    text: str


@dataclass(frozen=True)
class Bar:
    recipe: str
    kind: Kind
    y: float
    width: float
    speed: str
    rest: str


@dataclass(frozen=True)
class Bars:
    width: int
    height: float
    ticks: list[Tick]
    one: float
    bars: list[Bar]


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    anchor: str


@dataclass(frozen=True)
class Point:
    recipe: str
    kind: Kind
    mark: str
    label: Label
    title: str


@dataclass(frozen=True)
class Scatter:
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    frontier: str
    points: list[Point]


def nice_ticks(largest: float, wanted: int) -> list[float]:
    """Multiples of 1, 2 or 5 × 10ᵏ from 0 up to `largest`, about `wanted` of them."""
    ticks = MaxNLocator(wanted, steps=[1, 2, 5, 10]).tick_values(0, largest)
    return [float(tick) for tick in ticks if tick <= largest * (1 + 1e-9)]


def bars(results: Results, width: int) -> Bars:
    """Name and numbers on one line, the bar under them: nothing can overlap at any width."""
    rows = drawn_rows(results)
    pitch, top = 38, 4
    longest = max((row.speedup or 0.0 for row in rows), default=0.0) or 1.0
    drawn = [
        Bar(
            row.recipe,
            kind_of(row),
            top + pitch * index,
            (row.speedup or 0.0) / longest * width,
            speedup(row, results).text,
            " · ".join(facts(row)),
        )
        for index, row in enumerate(rows)
    ]
    ticks = [Tick(value / longest * width, f"{value:g}×") for value in nice_ticks(longest, 6)]
    return Bars(width, top + pitch * len(rows) + 22, ticks, width / longest, drawn)


def scatter(results: Results, width: int, height: int) -> Scatter:
    """Speed-up over LPIPS, both axes from zero, with the best speed for each LPIPS as a line."""
    rows = scored_rows(results)
    left, right, top, bottom = 38.0, width - 12.0, 34.0, height - 44.0
    far = max((_lpips(row) or 0.0 for row in rows), default=0.0) * 1.08
    far = far if far > 1e-6 else 0.1
    fast = max((row.speedup or 0.0 for row in rows), default=0.0) * 1.08 or 1.0

    def place(row: Row) -> tuple[float, float]:
        across, up = (_lpips(row) or 0.0) / far, (row.speedup or 0.0) / fast
        return left + across * (right - left), bottom - up * (bottom - top)

    places = [place(row) for row in rows]
    labels = _place_labels([row.recipe for row in rows], places, (left, right, top, bottom))
    points = [
        Point(
            row.recipe,
            kind_of(row),
            _mark(kind_of(row).key, *places[index]),
            labels[index],
            title=f"{row.recipe}: {speedup(row, results).text}, {', '.join(facts(row))}",
        )
        for index, row in enumerate(rows)
    ]
    x_ticks = [
        Tick(left + value / far * (right - left), f"{value:g}")
        for value in nice_ticks(far, 5 if width > NARROW else 4)
    ]
    y_ticks = [
        Tick(bottom - value / fast * (bottom - top), f"{value:g}×") for value in nice_ticks(fast, 5)
    ]
    frontier = _frontier(places, right)
    return Scatter(width, height, left, right, top, bottom, x_ticks, y_ticks, frontier, points)


def _lpips(row: Row) -> float | None:
    return metric(row, "lpips").value


def _frontier(places: list[tuple[float, float]], right: float) -> str:
    """A staircase through the points that no other beats in both speed and LPIPS."""
    path, best = "", math.inf
    for x, y in sorted(places):
        if y < best:
            path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f} {y:.1f}"
            best = y
    return f"{path}H{right:.1f}" if path else ""


def _mark(kind: str, x: float, y: float) -> str:
    """Circle, square, triangle, diamond: kinds stay apart without colour."""
    if kind == "recipe":
        return f"M{x - 5.5:.1f} {y:.1f}a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z"
    if kind == "fewer":
        return f"M{x:.1f} {y - 6.5:.1f}l6.5 11.5h-13z"
    if kind == "peer":
        return f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"
    return f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10z"


Box = tuple[float, float, float, float]
PLACES = (  # of a label around its point, the best first
    (10, 4, "start"),
    (-10, 4, "end"),
    (0, -11, "middle"),
    (0, 20, "middle"),
    (9, -8, "start"),
    (9, 16, "start"),
    (-9, -8, "end"),
    (-9, 16, "end"),
)


def _place_labels(names: list[str], places: list[tuple[float, float]], frame: Box) -> list[Label]:
    """For each point the first free of eight places around it; points and labels are obstacles."""
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    chosen = []
    for name, (x, y) in zip(names, places, strict=True):
        width = CHARACTER * len(name)
        labels = [Label(x + dx, y + dy, anchor) for dx, dy, anchor in PLACES]
        best = min(labels, key=lambda label: _cost(_label_box(label, width), taken, frame))
        taken.append(_label_box(best, width))
        chosen.append(best)
    return chosen


def _label_box(label: Label, width: float) -> Box:
    start = label.x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
    return (start, label.y - 10, start + width, label.y + 3)


def _cost(box: Box, taken: list[Box], frame: Box) -> float:
    """Area shared with what is taken; leaving the frame costs more than any overlap."""
    left, right, top, bottom = frame
    outside = max(0.0, left - box[0]) + max(0.0, box[2] - right)
    outside += max(0.0, top - box[1]) + max(0.0, box[3] - bottom)
    shared = sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )
    return shared + 1000 * outside


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
    parts = [f"{format_seconds(measured.median) if measured else MISSING} s"]
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
