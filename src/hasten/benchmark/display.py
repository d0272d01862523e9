"""How a notebook shows the results of a benchmark: the report's table, and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path

from pydantic import PrivateAttr

from hasten.results import Results

PROMPTS = 4  # of which pictures are shown: the report has all
SIDE = 192  # pixels of the longer side of a picture


class ShownResults(Results):
    """Results that know where their pictures are."""

    _folder: Path = PrivateAttr()

    @classmethod
    def of(cls, results: Results, folder: Path) -> ShownResults:
        """The same results, with the folder that holds their files."""
        shown = cls.model_validate(dict(results))
        shown._folder = folder
        return shown

    def _repr_html_(self) -> str:
        from hasten.report import table

        shown = [column for column in table.columns(self) if not column.wide]
        head = ["recipe", *(column.title for column in shown), "notes"]
        rows = [
            [row.recipe, *(column.cell(row).text for column in shown),
             "; ".join(table.notes(row, self))]
            for row in self.rows
        ]  # fmt: skip
        report = html.escape(str(self._folder / "report.html"))
        return (
            _table(head, (map(html.escape, row) for row in rows))
            + f"<p>{html.escape(table.drift_line(self))}<br>Report: <code>{report}</code></p>"
            + self._pictures()
        )

    def _pictures(self) -> str:
        """A row of pictures per prompt, under the names of the recipes."""
        pictured = [row for row in self.rows if row.images]
        rows = [
            [html.escape(prompt.text), *(_picture(self._folder / r.images[at]) for r in pictured)]
            for at, prompt in enumerate(self.workload.prompts[:PROMPTS])
        ]
        return _table(["prompt", *(row.recipe for row in pictured)], rows) if pictured else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already, under titles that are text."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _picture(path: Path) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.thumbnail((SIDE, SIDE))
            image.convert("RGB").save(buffer, "WEBP", quality=90)
    except OSError:
        return "–"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(path.parent.name)}" src="data:image/webp;base64,{data}">'
