"""`report.html`: one file that needs no network, no server and no other file."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hasten.report import plots, table
from hasten.report.pictures import Album
from hasten.report.plots import STYLE, TEMPLATES
from hasten.results import BASELINE, BASELINE_AGAIN, Prompt, Results, Row


def report_page(results: Results, album: Album) -> str:
    """The whole page. Everything from `results` is escaped; the style and the script come from
    the package, and the page's content security policy lets nothing else run or load."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The pictures' shape, for the layout before any of them is decoded.
    ratio = f":root{{--ratio:{results.workload.width}/{results.workload.height}}}\n"
    style = STYLE + ratio
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        **_context(results, album),
    )


def _context(results: Results, album: Album) -> dict[str, Any]:
    best = fastest(results)
    pictured = _pictured(results, album)
    return {
        "results": results,
        "table": table,
        "lede": lede(results),
        "kinds": plots.KINDS,
        "notes": {row.recipe: _notes(row, results) for row in results.rows},
        "timed_images": timed_images(results),
        "bars": _drawn(plots.bars, results, "Speed-up over the plain pipeline"),
        "scatters": _drawn(plots.scatter, results, "Speed-up over LPIPS"),
        "without_room": plots.without_room(results),
        "most": plots.MOST,
        "album": album,
        "pictured": pictured,
        "unpictured": [row for row in results.rows if row not in pictured],
        "right": best if best in pictured else pictured[-1] if pictured else None,
        "scores": scores,
    }


def fastest(results: Results) -> Row | None:
    """The fastest recipe of this library. Its rivals, fewer steps and other libraries, are not
    what the page is about."""
    rows = [row for row in plots.timed_rows(results) if row.role == "recipe"]
    return max(rows, key=lambda row: row.speedup or 0.0, default=None)


def lede(results: Results) -> str:
    """The fastest recipe in one sentence with what it costs, and what is missing to judge it."""
    best = fastest(results)
    if best is None:
        only = [
            f"For its quality only: {row.recipe}, LPIPS {table.metric(row, 'lpips').text}."
            for row in results.rows
            if row.role == "graph" and table.metric(row, "lpips").value is not None
        ]
        return " ".join(["No recipe was timed against the plain pipeline.", *only])
    seconds, *costs = table.row_facts(best)
    cost = f" ({', '.join(costs)})" if costs else ""
    speedup = table.speedup(best, results).text
    fast = f"{speedup} as fast as the plain pipeline{cost}"
    parts = [f"The fastest recipe, {best.recipe}, takes {seconds} per image, {fast}."]
    if table.lacks_rival(best, results):
        parts.append("Its rival, as few steps without the cache, was not measured.")
    if results.drift is None:
        parts.append("The baseline was not rendered again, so the drift is unknown.")
    return " ".join(parts)


def timed_images(results: Results) -> str:
    """How many images each median is of, if all are of as many."""
    timed = [row for row in results.rows if row.role != "graph"]
    counts = {row.seconds_per_image.n for row in timed if row.seconds_per_image}
    return f"{min(counts)} images" if len(counts) == 1 else ""


def scores(row: Row, prompt: Prompt) -> dict[str, str]:
    """The scores of one picture against the plain pipeline's, by the metric's title."""
    quality = row.quality_against(BASELINE)
    entries = quality.per_prompt if quality and row.recipe != BASELINE else ()
    return {
        title: form(value)
        for entry in entries
        for name, (title, _, form) in table.METRICS.items()
        if entry.id == prompt.id and (value := getattr(entry, name)) is not None
    }


def _notes(row: Row, results: Results) -> list[str]:
    """Its notes, without the one that stands under its name in the table."""
    return [note for note in table.notes(row, results) if note != "calibrated: false"]


def _pictured(results: Results, album: Album) -> list[Row]:
    """Rows with at least one readable picture, without a second baseline whose pixels are all
    those of the first."""

    def worth_showing(row: Row) -> bool:
        pictures_of_row = [album.pictures[row.recipe, index] for index in range(len(row.images))]
        repeated = all(picture.same_as == BASELINE for picture in pictures_of_row)
        readable = not all(picture.problem for picture in pictures_of_row)
        return readable and not (row.recipe == BASELINE_AGAIN and repeated)

    return [row for row in results.rows if worth_showing(row)]


def _drawn(draw: Any, results: Results, title: str) -> list[Markup]:
    """A plot for wide windows and for phones; the style sheet shows one of them."""
    figures = {"wide": draw(results, plots.WIDE), "narrow": draw(results, plots.NARROW)}
    # Safe: matplotlib escapes the texts in it.
    return [Markup(plots.to_svg(one, title, name)) for name, one in figures.items() if one]


def _policy(style: str, script: str) -> str:
    def fingerprint(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    return (
        f"default-src 'none'; img-src data:; style-src {fingerprint(style)}; "
        f"script-src {fingerprint(script)}; base-uri 'none'; form-action 'none'"
    )
