"""The comparison as a plot and a table, from its JSON alone.

    python -m studies.caching.report studies/results/caching/tiny.json

Writes MODEL.png and MODEL.md beside the JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["draw", "markdown", "write_report"]

TOLERANCE = 1.02
FAMILIES = {
    "hasten": ("#1f5fd0", "-", 1.4),
    "fewer steps": ("#777777", "--", 1.2),
    "diffusers": ("#d9731a", "-", 1.2),
    "cache-dit": ("#2a8f4e", "-", 1.2),
}
MARKERS = "osD^vP*X<>hp"
HEAD = """# Step caching at equal cost: `{model}`

{n} prompts, 128×128, {steps} steps, float32, {device}. LPIPS (AlexNet, mean) against the plain
pipeline's full {steps} steps; lower is closer. One evaluation is what one image costs in one step
of the plain pipeline; a skipped step is charged what it still computes (linear layers, attention).
Prompts: {prompts}. Each setting is the best found that costs at most
the budget + 2 %. Methods that decide by content got one image at a time.

![LPIPS against evaluations]({model}.png)
"""


def write_report(path: Path) -> None:
    """Write the plot and the table of a results file beside it."""
    results = json.loads(path.read_text("utf-8"))
    draw(results, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(markdown(results), "utf-8")


def markdown(results: dict[str, Any]) -> str:
    """The report: LPIPS by budget, every point with its setting, and what could not run."""
    budgets: list[float] = results["budgets"]
    rows = _sorted([row for row in results["rows"] if not row.get("blocks")], budgets)
    deep = _sorted([row for row in results["rows"] if row.get("blocks")], budgets)
    points = [point for row in rows for point in _points(row)]
    text = HEAD.format(
        model=results["model"],
        n=_span(point["n"] for point in points),
        steps=results["workload"]["steps"],
        device=_devices(results),
        prompts=results["workload"]["prompts"],
    )
    parts = (
        _by_budget(rows, budgets),
        _deeper(deep, budgets),
        _details(rows, results.get("timed_on")),
        _reasons(rows),
    )
    filled = ([*part, ""] for part in parts)
    return "\n".join([text, *("\n".join(lines) for lines in filled if lines != [""])])


def _by_budget(rows: list[dict[str, Any]], budgets: list[float]) -> Iterable[str]:
    best = {
        budget: min(
            (point["lpips"] for row in rows if (point := at_budget(row, budget))), default=None
        )
        for budget in budgets
    }
    yield "| evaluations | package | " + " | ".join(f"≤ {budget:g}" for budget in budgets) + " |"
    yield "|---|---|" + "---:|" * len(budgets)
    for row in rows:
        cells = []
        for budget in budgets:
            point = at_budget(row, budget)
            value = f"{point['lpips']:.5f}" if point else "–"
            cells.append(f"**{value}**" if point and point["lpips"] == best[budget] else value)
        if any(cell != "–" for cell in cells):
            yield f"| {row['method']} | {row['package']} | " + " | ".join(cells) + " |"


def _deeper(rows: list[dict[str, Any]], budgets: list[float]) -> Iterable[str]:
    if rows:
        blocks = rows[0]["blocks"]
        yield f"## Charged as in a model of {blocks} blocks"
        yield ""
        yield "These methods run the first block on a skipped step. This model has 11 blocks, so"
        yield "that costs them more here than in a deep one (FLUX.1-dev has 57). Below they are"
        yield f"charged as if there were {blocks}, and their settings searched anew."
        yield ""
        yield from _by_budget(rows, budgets)
        yield ""
        yield from _table(rows)


def _details(rows: list[dict[str, Any]], timed_on: str | None) -> Iterable[str]:
    where = f", on {timed_on}" if timed_on else ""
    yield "## Every point"
    yield ""
    yield f"LPIPS ± its standard error; s/plain: seconds an image, alone, and plain{where}; tried:"
    yield "settings judged in the search."
    yield ""
    yield from _table(rows)


def _table(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield (
        "| method | evaluations | computed | n | LPIPS | SSIM | PSNR | s/plain | tried | setting |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    for row in rows:
        for point in _points(row):
            values = point["per_prompt"]["lpips"]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
            seconds = "–"
            if "seconds" in point:
                seconds = f"{point['seconds']:.2f} / {point['plain_seconds']:.2f}"
            yield (
                f"| {row['method']} | {point['evaluations']:.2f} | {point['computed']:.1f} | "
                f"{point['n']} | {point['lpips']:.5f} ± {error:.5f} | {point['ssim']:.4f} | "
                f"{point['psnr']:.1f} | "
                f"{seconds} | {point.get('tried', '–')} | {_setting(point['setting'])} |"
            )


def _reasons(rows: list[dict[str, Any]]) -> Iterable[str]:
    notes = [f"- {row['method']}: {row['note']}" for row in rows if row.get("note")]
    places = sorted({_place(point) for row in rows for point in _points(row)} - {""})
    for place in places if len(places) > 1 else []:
        there = [row["method"] for row in rows if any(_place(p) == place for p in _points(row))]
        notes.append(f"- On {place}: {'; '.join(there)}")
    gone = [f"- {row['method']}: {row['reason']}" for row in rows if row["reason"]]
    gone += [
        f"- {row['method']}, {point['budget']:g} evaluations: {point['reason']}"
        for row in rows
        for point in row["points"]
        if point.get("reason")
    ]
    if notes:
        yield from ["## Notes", "", *notes, ""]
    if gone:
        yield from ["## Could not run", "", *gone]


def at_budget(row: dict[str, Any], budget: float) -> dict[str, Any] | None:
    """The row's point for a budget; a point without one serves every budget that it fits."""
    fitting = [
        point
        for point in _points(row)
        if point["budget"] == budget
        or (point["budget"] is None and 0.8 * budget < point["evaluations"] <= TOLERANCE * budget)
    ]
    return min(fitting, key=lambda point: point["lpips"], default=None)


def draw(results: dict[str, Any], path: Path) -> None:
    """LPIPS (log) against evaluations, a line a method; recipes with one point are marks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    used: dict[str, int] = {}
    rows = [row for row in results["rows"] if not row.get("blocks")]
    for row in _sorted(rows, results["budgets"]):
        points = sorted(_points(row), key=lambda point: point["evaluations"])
        if not points:
            continue
        family = _family(row)
        color, line, width = FAMILIES[family]
        used[family] = used.get(family, -1) + 1
        axes.plot(
            [point["evaluations"] for point in points],
            [point["lpips"] for point in points],
            line,
            color=color,
            linewidth=2 * width if row["method"] == "schedule" else width,
            alpha=0.9,
            marker=MARKERS[used[family] % len(MARKERS)],
            markersize=6,
            label=row["method"],
        )
    axes.set(
        yscale="log",
        xlabel=f"evaluations (transformer cost in plain steps, of {results['workload']['steps']})",
        ylabel="LPIPS to the full run (lower is closer)",
        title=f"Step caching at equal cost, {results['model']}",
        xticks=results["budgets"],
    )
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(True, which="both", alpha=0.25)
    _legend(figure, axes)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _legend(figure: Any, axes: Any) -> None:
    """Beside the plot, the methods under the name of their package."""
    from matplotlib.lines import Line2D

    lines = axes.get_lines()
    handles = []
    for family, (color, _, _) in FAMILIES.items():
        own = [line for line in lines if line.get_color() == color]
        if own:
            handles += [Line2D([], [], linestyle="none", label=f"{family}:"), *own]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)


def _points(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [point for point in row["points"] if point.get("lpips") is not None]


def _sorted(rows: list[dict[str, Any]], budgets: list[float]) -> list[dict[str, Any]]:
    """hasten first, then fewer steps, then the peers; within a family the closest first."""
    families = [*FAMILIES]

    def place(row: dict[str, Any]) -> tuple[int, float, str]:
        closest = [p["lpips"] for budget in budgets if (p := at_budget(row, budget))]
        return families.index(_family(row)), min(closest, default=9.0), row["method"]

    return sorted(rows, key=place)


def _family(row: dict[str, Any]) -> str:
    fewer = row["method"].startswith("fewer steps")
    return "fewer steps" if fewer else str(row["package"])


def _setting(setting: dict[str, Any]) -> str:
    if "toml" in setting:
        return str(setting.get("recipe", "the recipe file"))
    short = {name: value for name, value in setting.items() if not isinstance(value, list)}
    return ", ".join(f"{name} {value}" for name, value in short.items())


def _place(point: dict[str, Any]) -> str:
    return str(point.get("on") or "")


def _devices(results: dict[str, Any]) -> str:
    places = {_place(point) for row in results["rows"] for point in _points(row)} - {""}
    return " and ".join(sorted(places)) or "a CPU"


def _span(counts: Iterable[int]) -> str:
    found = sorted(set(counts)) or [0]
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
