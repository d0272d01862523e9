"""The two plots: bars of speed-up, and speed-up over LPIPS with labels at the points.

`speedup.png` and the page's SVGs are the same drawings. Lengths are CSS pixels, 72 per inch. Our
recipes have the one colour; the other roles are greys, told apart by hatches and marks.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from hasten.atomic import write_bytes
from hasten.report.table import headline, measured_on, metric, not_drawn, row_facts, speedup
from hasten.results import BASELINE_AGAIN, Results, Role, Row

WIDE, NARROW, README = 560, 330, 830  # widths: half of the page, a phone, a README's column
MOST = 7  # labelled rows per plot
LINE = 17  # height of a line of small text
LONGEST_REASON = 600  # characters; table.md and the page have all of it
TEMPLATES = Path(__file__).parent / "templates"
STYLE = (TEMPLATES / "report.css").read_text(encoding="utf-8")
# The page's custom properties by name, as it has them in light mode.
COLOURS: dict[str, str] = dict(re.findall(r"--(\w+): (#\w{6});", STYLE[: STYLE.index("@media")]))
# Names come from files: `parse_math` would read a dollar sign in them as mathematics.
TEXT: dict[str, Any] = {"va": "center", "parse_math": False, "textcoords": "offset points"}
SMALL = TEXT | {"size": 11, "color": COLOURS["muted"]}


@dataclass(frozen=True)
class Kind:
    """How the rows of one role look; `key` names a colour, `label` is written where it is not
    obvious from the row's name."""

    key: str
    label: str = ""
    hatch: str = ""
    mark: str = "o"


KINDS: dict[Role, Kind] = {
    "baseline": Kind("baseline", mark="s"),
    "recipe": Kind("ours"),
    "rival": Kind("rival", "without the cache", "////", "^"),
    "peer": Kind("peer", "other library", "....", "D"),
    "graph": Kind("rule", "graph on a CPU"),
}


def timed_rows(results: Results) -> list[Row]:
    """The rows with a speed-up, without the baseline's second rendering."""
    return [row for row in results.rows if row.speedup is not None and row.recipe != BASELINE_AGAIN]


def labelled_rows(results: Results) -> list[Row]:
    """At most seven timed rows, in their order: the baseline, recipes, rivals, then peers, and the
    fastest first where not all of a role have room."""
    roles, timed = list(KINDS), timed_rows(results)
    ranked = sorted(timed, key=lambda row: (roles.index(row.role), -(row.speedup or 0.0)))
    names = {row.recipe for row in ranked[:MOST]}
    return [row for row in timed if row.recipe in names]


def scored_rows(results: Results) -> list[Row]:
    """Timed rows with an LPIPS, and the baseline, whose LPIPS to itself is 0."""
    return [
        row
        for row in timed_rows(results)
        if row is results.rows[0] or metric(row, "lpips").value is not None
    ]


def without_room(results: Results) -> list[str]:
    """Timed rows that have no label in a plot, because seven others have."""
    named = {row.recipe for row in labelled_rows(results)}
    return [row.recipe for row in timed_rows(results) if row.recipe not in named]


def write_plot(results: Results, path: Path) -> None:
    """Write `speedup.png`: the same bytes for the same results."""
    png = io.BytesIO()
    picture(results).savefig(png, format="png", dpi=144, metadata={"Software": None})
    write_bytes(path, png.getvalue())


def picture(results: Results) -> Figure:
    """The bars under their title, above what is not drawn and why."""
    crowded = ", ".join(without_room(results))
    room = [f"{crowded}: in the table only, a plot has {MOST} rows at most"] if crowded else []
    foot: list[str] = []
    for text in [*not_drawn(results), *room]:
        text = textwrap.shorten(f"Not drawn: {text}", LONGEST_REASON, placeholder=" …")
        foot += textwrap.wrap(text, 118, subsequent_indent="   ")
    subtitle = f"Speed-up on {measured_on(results)}"
    head = [_short(headline(results), 88), *textwrap.wrap(subtitle, 118)]
    return bars(results, README, head, foot)


def bars(
    results: Results, width: int, head: Sequence[str] = (), foot: Sequence[str] = ()
) -> Figure:
    """One bar per row, from zero, under its name and numbers: nothing can overlap at any width.

    `head` and `foot` are lines of text above and below the bars.
    """
    rows = labelled_rows(results)
    pitch = 42 if width >= WIDE else 58
    margin = 18 if head else 0
    above, below = margin + LINE * len(head) + margin // 2, margin + LINE * len(foot)
    height = pitch * max(len(rows), 1)
    figure, axes = _canvas(width, height, (margin, above, margin, below))
    axes.set_axis_off()
    for index, line in enumerate([*head, *reversed(foot)]):
        y = below + height + above - margin - 4 - LINE * index
        look = SMALL if index else TEXT | {"size": 14, "color": COLOURS["ink"], "weight": "bold"}
        if index >= len(head):
            y, look = margin + LINE * (index - len(head)), SMALL
        axes.annotate(line, (margin, y), (0, 0), xycoords="figure points", **look)
    if not rows:
        axes.annotate("No row was timed.", (0, 0.5), (0, 0), **SMALL)
        return figure
    speeds = [row.speedup or 0.0 for row in rows]
    longest = max(speeds) or 1.0
    axes.set(xlim=(0, longest), ylim=(height, 0))
    middles = [pitch * place + pitch - 16 for place in range(len(rows))]
    kinds = [KINDS[row.role] for row in rows]
    look = {"hatch": [kind.hatch for kind in kinds], "edgecolor": COLOURS["paper"], "linewidth": 0}
    axes.barh(middles, speeds, 12, color=[COLOURS[kind.key] for kind in kinds], **look)
    starts, ends = [y - 8 for y in middles], [y + 8 for y in middles]
    axes.vlines([1] * len(rows), starts, ends, COLOURS["ink"], linewidth=1, clip_on=False)
    for place, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        y = place * pitch + 9
        look = TEXT | {"size": 12, "color": _ink(row), "weight": "bold"}
        name = axes.annotate(_short(row.recipe), (0, y), (0, 0), **look)
        axes.annotate(speedup(row, results).text, (longest, y), (0, 0), ha="right", **look)
        facts = " · ".join([*filter(None, [kind.label]), *row_facts(row)])
        if width >= WIDE:
            axes.annotate(facts, (1, 0.5), (8, 0), xycoords=name, **SMALL)
        else:
            axes.annotate(facts, (0, y), (0, -16), **SMALL)
    return figure


def scatter(results: Results, width: int) -> Figure | None:
    """Speed-up over LPIPS, both from zero, and a staircase of the best speed for each LPIPS; None
    if less than two rows have both."""
    rows = sorted(scored_rows(results), key=_lpips)
    if len(rows) < 2:
        return None
    figure, axes = _canvas(width, 290, (36, 30, 10, 44))
    across, up = [_lpips(row) for row in rows], [row.speedup or 0.0 for row in rows]
    far, fast = max(across) * 1.08, max(up) * 1.08 or 1.0
    far = far if far > 1e-6 else 0.1
    axes.set(xlim=(0, far), ylim=(0, fast))
    best = list(accumulate(up, max))
    line = {"color": COLOURS["muted"], "linewidth": 1, "linestyle": (0, (4, 3))}
    axes.step([*across, far], [*best, best[-1]], where="post", **line)
    named = {row.recipe for row in labelled_rows(results)}
    for row, x, y in zip(rows, across, up, strict=True):
        kind = KINDS[row.role]
        look: dict[str, Any] = {"color": COLOURS[kind.key], "markersize": 10}
        look["markersize"] = 10 if row.recipe in named else 5
        look |= {"markeredgecolor": COLOURS["paper"], "clip_on": False, "zorder": 3}
        axes.plot([x], [y], kind.mark, **look)
    for axis, ticks, form in ((axes.xaxis, 4, "{x:g}"), (axes.yaxis, 5, "{x:g}×")):
        axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(form)
    axes.tick_params(length=0, labelsize=11, labelcolor=COLOURS["muted"], pad=6)
    axes.grid(color=COLOURS["rule"], linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(COLOURS["muted"])
    axes.spines[["top", "right"]].set_visible(False)
    side = SMALL | {"xycoords": "axes fraction"}
    axes.annotate("speed-up; up and left is better", (0, 1), (-30, 16), **side)
    axis_title = "LPIPS to the plain pipeline (0 is identical)"
    axes.annotate(axis_title, (1, 0), (0, -34), ha="right", **side)
    points = [(row, (x, y)) for row, x, y in zip(rows, across, up, strict=True)]
    _label(axes, points, named)
    return figure


def _ink(row: Row) -> str:
    return COLOURS["ours" if row.role == "recipe" else "ink"]


def _lpips(row: Row) -> float:
    return metric(row, "lpips").value or 0.0


Place = tuple[int, int, str, str]
NEAR: tuple[Place, ...] = (  # of a label around its point; the first are above the staircase
    *((5, 4, "left", "bottom"), (-5, 4, "right", "bottom"), (0, 7, "center", "bottom")),
    *((9, 0, "left", "center"), (-9, 0, "right", "center"), (0, -7, "center", "top")),
    *((5, -4, "left", "top"), (-5, -4, "right", "top")),
)
PLACES = (*NEAR, *((3 * dx, 3 * dy, ha, va) for dx, dy, ha, va in NEAR))


def _label(axes: Axes, points: list[tuple[Row, tuple[float, float]]], named: set[str]) -> None:
    """For each named point the first place around it that is free, or else the one that covers
    least of other points and labels."""
    frame = Bbox.from_extents(axes.bbox.x0, 0, *axes.figure.bbox.size)
    pixels = [axes.transData.transform(point) for _, point in points]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in pixels]

    def put(label: Annotation, place: Place) -> Bbox:
        label.xyann = place[:2]
        label.set(ha=place[2], va=place[3])
        return label.get_window_extent()

    def cost(label: Annotation, place: Place) -> float:
        box = put(label, place)
        shared = sum(_shared(box, other) for other in taken)
        return shared + 1000 * (_shared(box, box) - _shared(box, frame))

    for row, point in points:
        if row.recipe in named:
            look = SMALL | {"color": _ink(row)}
            label = axes.annotate(_short(row.recipe), point, (0, 0), **look)
            free = (place for place in PLACES if cost(label, place) < 1)
            best = next(free, None) or min(PLACES, key=partial(cost, label))
            taken.append(put(label, best))


def _shared(one: Any, other: Any) -> float:
    """The area of two boxes' intersection."""
    both = Bbox.intersection(one, other)
    return float(both.width * both.height) if both else 0.0


def _canvas(
    width: float, height: float, around: tuple[float, float, float, float]
) -> tuple[Figure, Axes]:
    """A figure with axes of `height`, and that many pixels left, above, right and below them.

    Without pyplot: no global backend is chosen and no figure stays open.
    """
    left, above, right, below = around
    whole = height + above + below
    figure = Figure(figsize=(width / 72, whole / 72), dpi=72, facecolor=COLOURS["paper"])
    place = (left / width, below / whole, (width - left - right) / width, height / whole)
    return figure, figure.add_axes(place, facecolor="none")


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def to_svg(figure: Figure, title: str, variant: str) -> str:
    """The figure as an `<svg>` for the page: no style of its own, which the page's policy would
    refuse, and its colours are the page's custom properties."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title + variant}):
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    drawn = re.sub(r"<style.*?</style>", "", text.getvalue(), count=1, flags=re.DOTALL)
    drawn = re.sub(r"<[^>]+>", lambda tag: _for_page(tag[0]), drawn[drawn.index("<svg") :])
    width, height = (f"{side:g}" for side in figure.bbox.size)
    return drawn.replace(
        drawn[: drawn.index(">")],
        f'<svg class="plot {variant}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{title}; the table has the same numbers"',
        1,
    )


def _for_page(tag: str) -> str:
    """A tag without fonts and names, its styles as attributes. Text is escaped, so no tag."""
    tag = re.sub(r'(<g) id="[^"]*"|font-family: [^;"]*;?', r"\1", tag)
    tag = re.sub(r'style="([^"]*)"', lambda style: _attributes(style[1]), tag)
    for name, colour in COLOURS.items():
        tag = tag.replace(f'"{colour}"', f'"var(--{name})"')
    return re.sub(r"\s+", " ", tag)


def _attributes(style: str) -> str:
    pairs = (part.split(":", 1) for part in style.split(";") if ":" in part)
    return " ".join(f'{name.strip()}="{value.strip()}"' for name, value in pairs)
