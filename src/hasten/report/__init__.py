"""From `results.json` to a Markdown table, a plot and a page that stands alone. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from hasten.atomic import write_text
from hasten.errors import writing
from hasten.results import Results
from hasten.results_file import read_results

__all__ = ["write_report"]


def write_report(
    results: Results | str | os.PathLike[str], out_dir: str | os.PathLike[str]
) -> Path:
    """Write `table.md`, `speedup.png` and `report.html` to `out_dir`; return the page's path.

    Pictures are looked for next to the results file, or in `out_dir` where `results` is not a path.
    Raises InputError where the file is not valid results or `out_dir` cannot be written.
    """
    # Imported here: matplotlib and jinja2 take longer to load than `hasten --help` may take.
    from hasten.report import html, pictures, plots, table

    out = Path(out_dir)
    images_dir = out
    if not isinstance(results, Results):
        images_dir = Path(results).parent
        results = read_results(results)
    album = pictures.collect(results, images_dir, out)
    page = out / "report.html"
    with writing(out, "choose a directory that can be written, with room for about 15 MB"):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "table.md", table.to_markdown(results))
        plots.write_plot(results, out / "speedup.png")
        write_text(page, html.report_page(results, album))
    return page
