from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from hasten.report import table
from hasten.results import (
    PromptQuality,
    Results,
    Row,
    summarize_quality,
    summarize_seconds,
)
from tests.report.builders import make_results, measured_row, quality


def cells(markdown: str, recipe: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {recipe} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_line_holds_the_numbers_of_its_row(results: Results) -> None:
    found = cells(table.to_markdown(results), "max")
    assert found[2:] == [
        "6.61×",
        "12",
        "0.148",
        "0.868",
        "22.1",
        "35.1 GiB",
        "calibrated: false",
    ]


def test_medians_are_those_of_the_raw_samples(results: Results) -> None:
    text = table.to_markdown(results)
    for row in results.rows:
        if row.seconds_per_image:
            median = statistics.median(row.seconds_per_image.samples)
            shown = float(cells(text, row.recipe)[1])
            assert shown == pytest.approx(median, rel=0.005)


def test_a_row_that_cannot_run_keeps_its_line_and_its_reason(results: Results) -> None:
    found = cells(table.to_markdown(results), "tensorrt-fp8")
    assert set(found[1:-1]) == {"–"}
    assert found[-1].startswith("unsupported: no TensorRT runtime")


def test_a_row_for_its_quality_only_shows_no_time_and_says_why(tmp_path: Path) -> None:
    scored = (quality(1, 0.011, 0.977, 32.0),)
    row = measured_row("graph", 0.1, 50, 1, (), quality=scored, role="graph")
    results = make_results(tmp_path, count=1, pictures=False, extra_rows=(row,))
    found = cells(table.to_markdown(results), "graph")
    assert found[1:-1] == ["–", "–", "50", "0.0110", "0.977", "32.0", "–"]
    assert found[-1].startswith("for its quality only: onnxruntime")
    shown = {column.key: column.cell(row).text for column in table.columns(results)}
    assert (shown["step"], shown["setup"]) == ("–", "–")


def test_every_line_has_as_many_cells_as_the_head(results: Results) -> None:
    lines = [line for line in table.to_markdown(results).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(results.rows)
    assert {line.count(" | ") for line in lines} == {9 - 1}


def test_drift_and_environment_are_below(results: Results) -> None:
    text = table.to_markdown(results)
    assert "+1.5 % against the first time" in text
    assert "torch 2.13.0+cu130" in text
    assert "Quality: MS-SSIM needs sides over 160 pixels." in text


@pytest.mark.parametrize(
    ("seconds", "steady"), [(4.1, True), (3.85, True), (4.3, False), (3.7, False)]
)
def test_a_machine_that_was_not_steady_is_said_to_be_so(
    results: Results, seconds: float, steady: bool
) -> None:
    again = results.rows[-1].model_copy(update={"seconds_per_image": summarize_seconds([seconds])})
    drifted = results.model_copy(update={"rows": (*results.rows[:-1], again)})
    assert ("not steady" not in table.drift_line(drifted)) is steady


def test_drift_that_was_not_measured_is_said(results: Results) -> None:
    short = results.model_copy(update={"rows": results.rows[:-1]})
    assert "Drift: not measured" in table.drift_line(short)


def test_text_cannot_break_out_of_its_cell(tmp_path: Path) -> None:
    row = Row(
        recipe="bad",
        role="recipe",
        status="failed",
        reason="a|b\n<script>alert(1)</script> *x* `y`",
    )
    results = make_results(tmp_path, count=1, pictures=False, extra_rows=(row,))
    line = next(
        line for line in table.to_markdown(results).splitlines() if line.startswith("| bad |")
    )
    assert r"failed: a\|b &lt;script&gt;alert(1)&lt;/script&gt; \*x\* \`y\`" in line
    assert line.replace(r"\|", "").count("|") == 10


def test_a_second_reference_gets_its_own_column(tmp_path: Path) -> None:
    against = quality(1, 0.05, 0.95, 28.0).model_copy(update={"reference": "compile"})
    row = measured_row("lossless", 1.9, 50, 1, (), quality=(quality(1, 0.01, 0.99, 35.0), against))
    results = make_results(tmp_path, count=1, pictures=False, extra_rows=(row,))
    titles = [column.title for column in table.columns(results)]
    assert "LPIPS vs compile" in titles
    text = table.to_markdown(results)
    assert cells(text, "lossless")[titles.index("LPIPS vs compile") + 1] == "0.0500"
    assert cells(text, "compile")[titles.index("LPIPS vs compile") + 1] == "reference"


def test_ms_ssim_appears_once_it_is_known(tmp_path: Path, results: Results) -> None:
    scored = summarize_quality(
        "baseline", [PromptQuality(id=0, lpips=0.1, ssim=0.9, psnr=30.0, ms_ssim=0.93)]
    )
    row = measured_row("lossless", 1.9, 50, 1, (), quality=(scored,))
    known = make_results(tmp_path, count=1, pictures=False, extra_rows=(row,))
    assert "MS-SSIM" in [column.title for column in table.columns(known)]
    assert "MS-SSIM" not in [column.title for column in table.columns(results)]


def test_a_reason_of_one_row_stands_in_its_notes(results: Results) -> None:
    alone = measured_row(
        "random", 1.0, 50, 4, (), quality=(summarize_quality("baseline", [], "random weights"),)
    )
    mixed = results.model_copy(update={"rows": (*results.rows[:-1], alone)})
    assert table.common_quality_reason(mixed) is None
    assert table.notes(alone, mixed) == ["quality: random weights"]


def test_a_note_that_every_measured_row_has_is_said_once(results: Results) -> None:
    rows = [
        row.model_copy(update={"notes": ("random weights", *row.notes)})
        if row.status == "ok"
        else row
        for row in results.rows
    ]
    noted = results.model_copy(update={"rows": tuple(rows)})
    text = table.to_markdown(noted)
    assert text.count("random weights") == 1
    assert "Every row: random weights." in text
    assert cells(text, "cache")[-1] == "CUDA graphs declined: dynamic shapes"


def test_extra_numbers_have_columns_and_packages_stand_with_the_environment(
    results: Results,
) -> None:
    rows = [
        row.model_copy(update={"extra": {"held | GiB": 2.25}}) if row.recipe == "max" else row
        for row in results.rows
    ]
    environment = results.environment.model_copy(update={"packages": {"torchao": "0.18.0"}})
    text = table.to_markdown(
        results.model_copy(update={"rows": tuple(rows), "environment": environment})
    )
    assert "| held \\| GiB | notes |" in text
    assert cells(text, "max")[-2] == "2.25"
    assert cells(text, "baseline")[-2] == "–"
    assert "torchao 0.18.0" in text


def test_images_that_were_not_timed_have_no_columns_of_times(results: Results) -> None:
    untimed = [
        row.model_copy(update={"seconds_per_image": None, "speedup": None}) for row in results.rows
    ]
    text = table.to_markdown(results.model_copy(update={"rows": tuple(untimed)}))
    assert "| recipe | steps computed | LPIPS | SSIM | PSNR dB |" in text
    assert "No speed-ups" in text
    assert "rounds measured" not in text
