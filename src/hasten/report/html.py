"""`report.html`: one file that needs no network, no server and no other file."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hasten.report import charts, table
from hasten.report.charts import (
    Kind,
    drawn_rows,
    facts,
    kind_of,
    not_drawn,
    present_kinds,
    scored_rows,
)
from hasten.report.pictures import Album, AlbumPicture
from hasten.results import BASELINE, BASELINE_AGAIN, Prompt, PromptQuality, Results, Row

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Shot:
    """One recipe's picture of one prompt, with its scores as (name, text)."""

    recipe: str
    kind: Kind
    picture: AlbumPicture
    lpips: float | None
    scores: list[tuple[str, str]]


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
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8") + _ratio(results)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        **_context(results, album),
    )


def _context(results: Results, album: Album) -> dict[str, Any]:
    rows = list(results.rows)
    pictured = [row for row in rows if row.images]
    return {
        "results": results,
        "lede": lede(results),
        "workload": table.workload_facts(results.workload),
        "environment": table.environment_facts(results.environment),
        "columns": table.columns(results),
        "kind_of": kind_of,
        "notes": {row.recipe: table.notes(row, results) for row in rows},
        "drift": table.drift_line(results),
        "common_notes": table.common_notes(results),
        "timed_images": timed_images(results),
        "quality_reason": table.common_quality_reason(results),
        "not_drawn": not_drawn(results),
        "kinds": present_kinds(rows),
        "bars": [charts.bars(results, width) for width in (charts.WIDE, charts.NARROW)],
        "scatters": _scatters(results),
        "shots": shots(results, album),
        "pictured": pictured,
        "compared": [row for row in pictured if row.recipe != BASELINE],
        "hidden_at_first": BASELINE_AGAIN,
        "has_baseline": rows[0] in pictured,
        "has_lpips": any(
            table.metric(row, "lpips").value is not None
            for row in rows
            if row.recipe != BASELINE_AGAIN
        ),
        "encoding": album.encoding,
    }


def lede(results: Results) -> str:
    """The fastest recipe of this library, in one sentence with what it costs, and what is missing
    to judge it. Its rivals, fewer steps and other libraries, are not what the page is about."""
    rows = [row for row in drawn_rows(results) if row.role == "recipe"]
    if not rows:
        return " ".join(["No recipe was timed against the baseline.", *_scored_only(results)])
    best = max(rows, key=lambda row: row.speedup or 0.0)
    speedup = table.speedup(best, results).text
    parts = [f"Fastest: {best.recipe}, {speedup} ({', '.join(facts(best))})."]
    if table.lacks_rival(best, results):
        parts.append("Its rival, as few steps without the cache, was not measured.")
    if results.drift is None:
        parts.append("The baseline was not rendered again, so the drift is unknown.")
    return " ".join(parts)


def _scored_only(results: Results) -> list[str]:
    return [
        f"For its quality only: {row.recipe}, LPIPS {table.metric(row, 'lpips').text}."
        for row in results.rows
        if row.role == "graph" and table.metric(row, "lpips").value is not None
    ]


def timed_images(results: Results) -> str:
    """How many images each median stands on, if all stand on as many."""
    timed = [row for row in results.rows if row.role != "graph"]
    counts = {row.seconds_per_image.n for row in timed if row.seconds_per_image}
    return f"{min(counts)} images" if len(counts) == 1 else ""


def shots(results: Results, album: Album) -> list[list[Shot]]:
    """For each prompt every picture of it, the baseline's first."""
    return [
        [
            _shot(row, prompt, album.pictures[row.recipe, index])
            for row in results.rows
            if row.images
        ]
        for index, prompt in enumerate(results.workload.prompts)
    ]


def _shot(row: Row, prompt: Prompt, picture: AlbumPicture) -> Shot:
    quality = row.quality_against(BASELINE)
    entries = quality.per_prompt if quality and row.recipe != BASELINE else ()
    entry = next((entry for entry in entries if entry.id == prompt.id), None)
    return Shot(row.recipe, kind_of(row), picture, entry.lpips if entry else None, _scores(entry))


def _scores(entry: PromptQuality | None) -> list[tuple[str, str]]:
    if entry is None:
        return []
    titles = {"lpips": "LPIPS", "ssim": "SSIM", "psnr": "PSNR", "ms_ssim": "MS-SSIM"}
    return [
        (title, table.METRIC_FORMAT[name](getattr(entry, name)))
        for name, title in titles.items()
        if getattr(entry, name) is not None
    ]


def _scatters(results: Results) -> list[charts.Scatter]:
    if len(scored_rows(results)) < 2:
        return []
    return [charts.scatter(results, width, 380) for width in (charts.WIDE, charts.NARROW)]


def _ratio(results: Results) -> str:
    """The pictures' shape, for the layout before any of them is decoded."""
    return f":root{{--ratio:{results.workload.width}/{results.workload.height}}}\n"


def _policy(style: str, script: str) -> str:
    def fingerprint(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    return (
        f"default-src 'none'; img-src data:; style-src {fingerprint(style)}; "
        f"script-src {fingerprint(script)}; base-uri 'none'; form-action 'none'"
    )
