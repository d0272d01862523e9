"""What a notebook shows: the table of the report, and pictures."""

from __future__ import annotations

from pathlib import Path

from hasten.benchmark.display import PROMPTS, ShownResults
from hasten.results import Results
from tests.report.builders import make_results


def test_results_show_a_table_and_pictures(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    shown = ShownResults.of(results, tmp_path)
    page = shown._repr_html_()
    pictured = [row for row in results.rows if row.images]
    assert page.count("<img") == len(pictured) * min(PROMPTS, len(results.workload.prompts))
    assert all(f"<td>{row.recipe}</td>" in page for row in results.rows)
    assert "Drift: " in page
    assert str(tmp_path / "report.html") in page
    assert Results.model_validate_json(shown.model_dump_json(by_alias=True)) == results


def test_what_is_text_stays_text_and_a_lost_picture_is_a_dash(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    prompts = [
        prompt.model_copy(update={"text": "<script>"}) for prompt in results.workload.prompts
    ]
    workload = results.workload.model_copy(update={"prompts": tuple(prompts)})
    for picture in tmp_path.rglob("*.png"):
        picture.unlink()
    hostile = results.model_copy(update={"workload": workload})
    page = ShownResults.of(hostile, tmp_path)._repr_html_()
    assert "<script>" not in page
    assert "<img" not in page
    assert "<td>–</td>" in page
