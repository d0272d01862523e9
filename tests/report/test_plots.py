from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from PIL import Image

from hasten.report import plots
from hasten.results import Results, Row
from tests.report.builders import make_results, measured_row, quality

WIDTHS = [plots.WIDE, plots.NARROW]


def drawn_scatter(results: Results, width: int) -> Figure:
    figure = plots.scatter(results, width)
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Six recipes, two of them not in time, with two peers and a rival."""
    rows = [
        measured_row(f"mine-{n}", 3.0 + n, 50, 1, (), quality=(quality(1, 0.3, 0.9, 20.0),))
        for n in range(2)
    ]
    folder = tmp_path_factory.mktemp("crowd")
    return make_results(folder, count=1, pictures=False, extra_rows=tuple(rows))


@pytest.mark.parametrize("width", WIDTHS)
def test_bars_start_at_zero_and_end_at_the_speedup(results: Results, width: int) -> None:
    axes = plots.bars(results, width).axes[0]
    assert axes.get_xlim()[0] == 0
    bars = axes.containers[0]
    assert isinstance(bars, BarContainer)
    assert [bar.get_width() for bar in bars] == [row.speedup for row in plots.timed_rows(results)]


def test_seven_rows_have_a_label_and_peers_go_first(crowd: Results) -> None:
    named = [row.recipe for row in plots.labelled_rows(crowd)]
    recipes = ["baseline", "compile", "cache", "cache-compile", "max"]
    assert named == [*recipes, "mine-0", "mine-1"]
    left = plots.without_room(crowd)
    assert left == ["fewer-steps-18", "cache-dit-18"]
    shown = words(plots.picture(crowd))
    assert any(text.startswith("Not drawn: fewer-steps-18, cache-dit-18: in the") for text in shown)
    figure = drawn_scatter(crowd, plots.WIDE)
    assert set(named) <= set(words(figure))
    assert not set(left) & set(words(figure))
    marks = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert len(marks) == len(named) + len(left), "without a label, but not without a mark"


def test_only_our_recipes_have_a_colour(crowd: Results) -> None:
    for row in crowd.rows:
        red, green, blue = bytes.fromhex(plots.COLOURS[plots.KINDS[row.role].key][1:])
        grey = max(red, green, blue) - min(red, green, blue) < 32
        assert grey is (row.role != "recipe")


def test_what_is_not_drawn_is_listed(results: Results) -> None:
    found = words(plots.picture(results))
    assert any(text.startswith("Not drawn: tensorrt-fp8, unsupported: no") for text in found)
    assert "tensorrt-fp8" not in found


def test_a_speedup_never_stands_without_its_lpips(results: Results) -> None:
    assert "0.610 s · LPIPS 0.148 · calibrated: false" in words(plots.picture(results))


@pytest.mark.parametrize("width", [*WIDTHS, plots.README])
@pytest.mark.parametrize("speedup", [0.2, 1.0, 40.0])
def test_no_text_leaves_the_picture_or_touches_another(
    tmp_path: Path, speedup: float, width: int
) -> None:
    name = "a-recipe-with-a-very-long-name-indeed"
    rows = (
        measured_row(name, 4.03 / speedup, 50, 1, (), quality=(quality(1, 0.2, 0.9, 20.0),)),
        Row(recipe="broken", role="recipe", status="failed", reason="word " * 100_000),
    )
    results = make_results(tmp_path, count=1, pictures=False, extra_rows=rows)
    figure = plots.picture(results) if width == plots.README else plots.bars(results, width)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1 + 1e-9
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
    for one, other in itertools.combinations(boxes, 2):
        assert plots._shared(one, other) < 40, "at most a pixel of two lines of text"


@pytest.mark.parametrize("width", WIDTHS)
def test_points_lie_where_their_numbers_say(results: Results, width: int) -> None:
    axes = drawn_scatter(results, width).axes[0]
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
    places = {tuple(map(float, line.get_xydata()[0])) for line in axes.lines}
    for row in plots.scored_rows(results):
        assert (plots._lpips(row), row.speedup) in places


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_stay_inside_and_apart(results: Results, width: int) -> None:
    figure = drawn_scatter(results, width)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
    assert all(plots._shared(a, b) == 0 for a, b in itertools.combinations(boxes, 2))


def test_the_staircase_passes_through_unbeaten_points_only(results: Results) -> None:
    stairs = drawn_scatter(results, plots.WIDE).axes[0].lines[0]
    # baseline, compile, cache, cache-compile, max; not the peer nor fewer steps, which are beaten
    assert len(set(map(float, stairs.get_ydata()))) == 5


def test_the_same_results_give_the_same_svg(results: Results) -> None:
    first, second = (
        plots.to_svg(drawn_scatter(results, plots.WIDE), "title", "wide") for _ in range(2)
    )
    assert first == second
    assert "2026" not in first
    assert "font-family" not in first


def test_text_of_an_svg_is_escaped_and_left_as_it_is(tmp_path: Path) -> None:
    name = '<b style="fill: #ffffff">'
    rows = (measured_row(name, 1.0, 50, 1, ()),)
    results = make_results(tmp_path, count=1, pictures=False, extra_rows=rows)
    text = plots.to_svg(plots.bars(results, plots.WIDE), "title", "wide")
    assert '&lt;b style="fill: #ffffff"&gt;' in text
    assert "<b" not in text


def test_the_file_is_a_png_of_twice_a_readme_and_always_the_same(
    results: Results, tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        plots.write_plot(results, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.width == 2 * plots.README


def test_names_are_not_read_as_mathematics(tmp_path: Path) -> None:
    odd = measured_row("a$b_{c$", 1.0, 50, 1, (), quality=(quality(1, 0.2, 0.9, 20.0),))
    results = make_results(tmp_path, count=1, pictures=False, extra_rows=(odd,))
    plots.write_plot(results, tmp_path / "p.png")
    assert "a$b_{c$" in words(drawn_scatter(results, plots.WIDE))


def test_a_baseline_that_failed_leaves_a_plot_that_says_so(
    results: Results, tmp_path: Path
) -> None:
    failed = Row(recipe="baseline", role="baseline", status="failed", reason="out of memory")
    alone = results.model_copy(update={"rows": (failed,)})
    assert "No row was timed." in words(plots.picture(alone))
    plots.write_plot(alone, tmp_path / "p.png")


def test_neither_torch_nor_pyplot_is_imported() -> None:
    code = (
        "import sys, hasten.report\n"
        "from hasten.report import html, pictures, plots, table\n"
        "loaded = {'torch', 'diffusers', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
