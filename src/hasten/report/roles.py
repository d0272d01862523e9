"""What sort of row it is, and how that looks: a hue that survives colour blindness (Okabe and Ito,
2008) and, in charts, a shape or a hatch as well."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.results import BASELINE, BASELINE_AGAIN, Row


@dataclass(frozen=True)
class Kind:
    key: str
    label: str
    colour: str
    hatch: str = ""


BASELINE_KIND = Kind("baseline", "baseline", "#767676")
RECIPE = Kind("recipe", "recipe", "#0072B2")
FEWER_STEPS = Kind("fewer", "fewer steps, nothing cached", "#E69F00", "//")
QUALITY_ONLY = Kind("quality", "graph on a CPU, for its quality only", "#CC79A7")
PEER = Kind("peer", "other library", "#009E73", "..")


def kind_of(row: Row) -> Kind:
    if row.recipe in (BASELINE, BASELINE_AGAIN):
        return BASELINE_KIND
    if row.quality_only:
        return QUALITY_ONLY
    if row.peer:
        return PEER
    return FEWER_STEPS if "fewer-steps" in row.recipe else RECIPE


def present_kinds(rows: list[Row]) -> list[Kind]:
    """The kinds among `rows`, in the order of a legend."""
    found = {kind_of(row) for row in rows}
    order = (BASELINE_KIND, RECIPE, FEWER_STEPS, QUALITY_ONLY, PEER)
    return [kind for kind in order if kind in found]
