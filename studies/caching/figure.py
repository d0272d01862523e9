"""The comparison at all budgets as one table and one plot.

    python -m studies.caching.figure studies/results/caching tiny

Writes MODEL.md and MODEL.png next to the folders of the model's results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from studies.caching.results import package_of

from hasten.results import BASELINE, Results, Row
from hasten.results_file import read_results

__all__ = ["draw", "lpips_of", "markdown", "read_budgets", "write_figure"]

Budgets = dict[int, Results]
FAMILIES = {
    "hasten": ("#1f5fd0", "-", 1.4),
    "fewer steps": ("#777777", "--", 1.2),
    "diffusers": ("#d9731a", "-", 1.2),
    "cache-dit": ("#2a8f4e", "-", 1.2),
}
MARKERS = "osD^vP*X<>hp"
HEAD = """# Step caching at equal cost: `{model}`

{n} prompts, {width}×{height}, {steps} steps, {dtype}. LPIPS (AlexNet, mean) against the plain
pipeline's full {steps} steps; lower is closer. One evaluation is what one image costs in one step
of the plain pipeline; a skipped step is charged what it still computes (linear layers, attention).
Prompts: {source}. Each setting is the best found that costs at
most the budget + 2 %. Methods that decide by content got one image at a time. Every point with its
setting, SSIM and PSNR: {links}.

![LPIPS against evaluations]({model}.png)
"""


def read_budgets(root: Path, model: str) -> Budgets:
    """A model's results by budget, the largest first."""
    found = {
        int(budget): read_results(path)
        for path in root.glob(f"{model}-*/results.json")
        if (budget := path.parent.name.removeprefix(f"{model}-")).isdigit()
    }
    return dict(sorted(found.items(), reverse=True))


def write_figure(root: Path, model: str) -> None:
    """Write a model's table and plot next to its results."""
    budgets = read_budgets(root, model)
    draw(budgets, root / f"{model}.png")
    (root / f"{model}.md").write_text(markdown(budgets), "utf-8")


def markdown(budgets: Budgets) -> str:
    """LPIPS by budget, with the best of each budget in bold."""
    work = next(iter(budgets.values())).workload
    head = HEAD.format(
        model=work.model,
        n=len(work.prompts),
        width=work.width,
        height=work.height,
        steps=work.steps,
        dtype=work.dtype,
        source=work.prompt_source,
        links=", ".join(f"[≤ {one}]({work.model}-{one}/table.md)" for one in budgets),
    )
    return "\n".join([head, *_table(budgets), ""])


def _table(budgets: Budgets) -> Iterator[str]:
    yield "| evaluations | package | " + " | ".join(f"≤ {one}" for one in budgets) + " |"
    yield "|---|---|" + "---:|" * len(budgets)
    rows = _by_name(budgets)
    best = [
        min((lpips_of(row[one]) for row in rows.values() if one in row), default=None)
        for one in budgets
    ]
    for name, row in rows.items():
        cells = []
        for one, least in zip(budgets, best, strict=True):
            value = f"{lpips_of(row[one]):.5f}" if one in row else "–"
            closest = one in row and lpips_of(row[one]) == least
            cells.append(f"**{value}**" if closest else value)
        yield f"| {name} | {package_of(name)} | " + " | ".join(cells) + " |"


def lpips_of(row: Row) -> float:
    """Mean LPIPS of a measured row."""
    quality = row.quality_against(BASELINE)
    assert quality is not None
    assert quality.lpips is not None
    return quality.lpips


def _by_name(budgets: Budgets) -> dict[str, dict[int, Row]]:
    """Measured rows by name and budget: hasten's first, then fewer steps, then peers; within a
    family the closest first."""
    found: dict[str, dict[int, Row]] = {}
    for budget, results in budgets.items():
        for row in results.rows[1:]:
            if row.status == "ok":
                found.setdefault(row.recipe, {})[budget] = row
    families = [*FAMILIES]

    def place(name: str) -> tuple[int, float, str]:
        return families.index(_family(name)), min(map(lpips_of, found[name].values())), name

    return {name: found[name] for name in sorted(found, key=place)}


def _family(name: str) -> str:
    return "fewer steps" if name.startswith("fewer steps") else package_of(name)


def draw(budgets: Budgets, path: Path) -> None:
    """LPIPS (log) against evaluations, one line per method; a recipe with one point is a mark."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    work = next(iter(budgets.values())).workload
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    used: dict[str, int] = {}
    for name, row in _by_name(budgets).items():
        points = sorted((one.extra["evaluations"], lpips_of(one)) for one in row.values())
        color, line, width = FAMILIES[_family(name)]
        used[color] = used.get(color, -1) + 1
        axes.plot(
            *zip(*points, strict=True),
            line,
            color=color,
            linewidth=2 * width if name == "schedule" else width,
            alpha=0.9,
            marker=MARKERS[used[color] % len(MARKERS)],
            markersize=6,
            label=name,
        )
    axes.set(
        yscale="log",
        xlabel=f"evaluations (transformer cost in plain steps, of {work.steps})",
        ylabel="LPIPS to the full run (lower is closer)",
        title=f"Step caching at equal cost, {work.model}",
        xticks=[*budgets],
    )
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(True, which="both", alpha=0.25)
    _legend(figure, axes)
    figure.savefig(path, dpi=130)


def _legend(figure: Any, axes: Any) -> None:
    """Beside the plot, the methods under the name of their package."""
    from matplotlib.lines import Line2D

    handles = []
    for family, (color, _, _) in FAMILIES.items():
        own = [line for line in axes.get_lines() if line.get_color() == color]
        if own:
            handles += [Line2D([], [], linestyle="none", label=f"{family}:"), *own]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)


if __name__ == "__main__":
    write_figure(Path(sys.argv[1]), sys.argv[2])
