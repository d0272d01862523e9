from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.container import BarContainer
from PIL import Image

from hasten.report.plot import DPI, WIDTH, draw, write_plot
from hasten.results import Results, Row
from tests.report.builders import make_results, measured_row


def words(results: Results) -> list[str]:
    figure = draw(results)
    texts = [text.get_text() for text in figure.texts]
    return texts + [text.get_text() for axes in figure.axes for text in axes.texts]


def test_bars_start_at_zero_and_end_at_the_speedup(results: Results) -> None:
    axes = draw(results).axes[0]
    assert axes.get_xlim()[0] == 0
    bars = axes.containers[0]
    assert isinstance(bars, BarContainer)
    drawn = [bar.get_width() for bar in bars]
    assert drawn == [row.speedup for row in results.rows if row.status == "ok"]


def test_what_is_not_drawn_is_listed(results: Results) -> None:
    found = words(results)
    assert any(text.startswith("Not drawn: tensorrt-fp8, unsupported: no") for text in found)
    names = [label.get_text() for label in draw(results).axes[0].get_yticklabels()]
    assert "tensorrt-fp8" not in names


def test_a_speedup_never_stands_without_its_lpips(results: Results) -> None:
    assert "0.610 s  ·  LPIPS 0.148  ·  calibrated: false" in words(results)


@pytest.mark.parametrize("speedup", [0.2, 1.0, 40.0])
def test_no_text_leaves_the_picture(tmp_path: Path, speedup: float) -> None:
    rows = (
        measured_row("a-recipe-with-a-very-long-name-indeed", 4.03 / speedup, 50, 1, ()),
        Row(recipe="broken", role="recipe", status="failed", reason="word " * 100_000),
    )
    figure = draw(make_results(tmp_path, count=1, pictures=False, extra_rows=rows))
    figure.draw_without_rendering()
    axes, edge = figure.axes[0], figure.bbox
    labels = [*axes.get_xticklabels(), *axes.get_yticklabels(), *figure.legends[0].get_texts()]
    for text in [*figure.texts, *axes.texts, *labels]:
        box = text.get_window_extent()
        assert edge.x0 <= box.x0, text
        assert box.x1 <= edge.x1, text
        assert edge.y0 <= box.y0, text
        assert box.y1 <= edge.y1, text


def test_the_file_is_a_png_of_twice_a_readme_and_always_the_same(
    results: Results, tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        write_plot(results, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.width == int(WIDTH * DPI)


def test_names_are_not_read_as_mathematics(tmp_path: Path) -> None:
    odd = measured_row("a$b_{c$", 1.0, 50, 1, ())
    write_plot(
        make_results(tmp_path, count=1, pictures=False, extra_rows=(odd,)), tmp_path / "p.png"
    )


def test_a_baseline_that_failed_leaves_a_plot_that_says_so(
    results: Results, tmp_path: Path
) -> None:
    failed = Row(recipe="baseline", role="baseline", status="failed", reason="out of memory")
    alone = results.model_copy(update={"rows": (failed,)})
    assert "No row was measured." in words(alone)
    write_plot(alone, tmp_path / "p.png")


def test_neither_torch_nor_pyplot_is_imported() -> None:
    code = (
        "import sys, hasten.report\n"
        "from hasten.report import html, pictures, plot, table\n"
        "loaded = {'torch', 'diffusers', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
