"""`speedup.png`: one bar per row, from zero, with its seconds and its LPIPS written beside it."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hasten.atomic import write_bytes
from hasten.report.charts import drawn_rows, facts, kind_of, nice_ticks, not_drawn, present_kinds
from hasten.report.table import speedup
from hasten.results import Results, Row

# A README column is about 830 CSS pixels wide; twice that many device pixels stay sharp.
WIDTH, DPI = 8.3, 200
# Inches, from the edges inwards: a fixed layout gives the same picture for the same results.
HEAD, FOOT, BAR, LINE, MARGIN = 1.0, 0.42, 0.36, 0.175, 0.15
LONGEST_REASON = 600  # characters; table.md and the page have all of it
NO_METADATA = {"Software": None}  # the same results give the same bytes
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 1}
INK, MUTED, RULE = "#1f2328", "#59636e", "#d8dee4"


def write_plot(results: Results, path: Path) -> None:
    """Without pyplot: no global backend is chosen and no figure stays open. Writing PNG is Agg."""
    png = io.BytesIO()
    draw(results).savefig(png, format="png", dpi=DPI, facecolor="white", metadata=NO_METADATA)
    write_bytes(path, png.getvalue())


def draw(results: Results) -> Figure:
    rows, footer = drawn_rows(results), _footer(results)
    subtitle = textwrap.wrap(_subtitle(results), 115)
    below = FOOT + LINE * len(footer)
    height = HEAD + LINE * (len(subtitle) - 1) + BAR * max(len(rows), 1) + below
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)

    def write(text: str, y: float, size: float, colour: str, weight: str = "normal") -> None:
        """One line of text whose centre is `y` inches above the lower edge."""
        figure.text(
            MARGIN / WIDTH,
            y / height,
            text,
            fontsize=size,
            color=colour,
            fontweight=weight,
            va="center",
            parse_math=False,
        )

    write("Speed-up over the baseline", height - 0.24, 13, INK, "bold")
    for index, line in enumerate(subtitle):
        write(line, height - 0.5 - LINE * index, 9, MUTED)
    for index, line in enumerate(footer):
        write(line, MARGIN + LINE * (len(footer) - 1 - index), 8.5, MUTED)
    if not rows:
        write("No row was measured.", below + BAR / 2, 10, INK)
        return figure
    names = 0.2 + 0.083 * max(len(_short(row.recipe)) for row in rows)
    width, bars = WIDTH - names - MARGIN, BAR * len(rows)
    axes = figure.add_axes((names / WIDTH, below / height, width / WIDTH, bars / height))
    _bars(axes, rows, results)
    _dress(axes, rows, width)
    _legend(figure, rows, (below + bars + 0.24) / height)
    return figure


def _bars(axes: Axes, rows: list[Row], results: Results) -> None:
    kinds = [kind_of(row) for row in rows]
    bars = axes.barh(
        range(len(rows)),
        [row.speedup or 0.0 for row in rows],
        height=0.62,
        color=[kind.colour for kind in kinds],
        hatch=[kind.hatch for kind in kinds],
        edgecolor="white",
        linewidth=0,
    )
    texts = [speedup(row, results).text for row in rows]
    numbers = axes.bar_label(
        bars, texts, padding=6, fontsize=10, fontweight="bold", color=INK, bbox=HALO
    )
    for number, row in zip(numbers, rows, strict=True):
        axes.annotate(
            _words(row),
            (1, 0.5),
            (8, 0),
            xycoords=number,
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=MUTED,
            bbox=HALO,
        )


def _dress(axes: Axes, rows: list[Row], width: float) -> None:
    """Scale, ticks and lines. The scale starts at zero and leaves room for every bar's words."""
    longest = max(row.speedup or 0.0 for row in rows) or 1.0
    words = [0.68 + 0.066 * len(_words(row)) for row in rows]
    room = [
        (row.speedup or 0.0) * width / (width - word) for row, word in zip(rows, words, strict=True)
    ]
    axes.set_xlim(0, max(*room, longest))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_short(row.recipe) for row in rows])
    ticks = nice_ticks(longest, 6)
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    for label in axes.get_yticklabels():
        label.set(parse_math=False, fontsize=10, color=INK)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=9, labelcolor=MUTED)
    axes.vlines(ticks[1:], -0.5, len(rows) - 0.5, color=RULE, linewidth=0.7, zorder=0)
    axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0.5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(INK)


def _words(row: Row) -> str:
    return "  ·  ".join(facts(row))


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"


def _legend(figure: Figure, rows: list[Row], y: float) -> None:
    kinds = present_kinds(rows)
    handles = [
        Patch(facecolor=kind.colour, hatch=kind.hatch, edgecolor="white", linewidth=0)
        for kind in kinds
    ]
    figure.legend(
        handles=handles,
        labels=[kind.label for kind in kinds],
        loc="center left",
        bbox_to_anchor=(MARGIN / WIDTH, y),
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.6,
        ncols=len(kinds),
        fontsize=8.5,
        labelcolor=MUTED,
        frameon=False,
    )


def _subtitle(results: Results) -> str:
    work, count = results.workload, len(results.workload.prompts)
    device = results.environment.gpu or results.environment.device
    return (
        f"{work.model}, {work.width} × {work.height}, {work.steps} steps, {work.dtype}, "
        f"{device}; median of {count} prompt{'s' * (count != 1)}"
    )


def _footer(results: Results) -> list[str]:
    """Why a row has no bar, wrapped to the width of the picture."""
    lines: list[str] = []
    for text in not_drawn(results):
        text = textwrap.shorten(f"Not drawn: {text}", LONGEST_REASON, placeholder=" …")
        lines += textwrap.wrap(text, 120, subsequent_indent="   ")
    return lines
