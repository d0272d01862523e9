from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hasten.errors import InputError
from hasten.report import html, plots, table, write_report
from hasten.report.pictures import Album
from hasten.report.plots import KINDS
from hasten.results import Results, Row, summarize_seconds, with_speedups
from tests.report.builders import CACHE, make_results, measured_row, quality

HOSTILE = [
    "<script>alert('prompt')</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)\' {{ 7 * 7 }} {% raw %} &amp;',
]


class Page(HTMLParser):
    """Counts what a browser would act upon."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_three_files_are_written_and_the_page_returned(folder: Path) -> None:
    assert {"table.md", "speedup.png", "report.html"} <= {path.name for path in folder.iterdir()}


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "base"}
        for name in ("src", "srcset", "poster", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
        if tag == "link":
            assert attributes["href"] == "data:,"


def test_links_lead_to_the_pngs_and_nowhere_else(page: Page, folder: Path) -> None:
    links = [attributes["href"] or "" for attributes in page.named("a")]
    assert len(links) == 7 * 4
    assert all((folder / link).is_file() for link in links)


def test_style_and_script_hold_no_address() -> None:
    for name in ("report.css", "report.js"):
        text = (plots.TEMPLATES / name).read_text(encoding="utf-8")
        assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|</", text)


def test_hostile_prompts_recipes_and_reasons_stay_text(tmp_path: Path) -> None:
    rows = (
        Row(recipe="bad", role="recipe", status="failed", reason=HOSTILE[0], toml=HOSTILE[1]),
        measured_row('<b onclick="x">', 1.0, 50, 3, (), notes=HOSTILE[1:]),
    )
    results = make_results(tmp_path, count=3, size=(16, 16), captions=HOSTILE, extra_rows=rows)
    text = write_report(results, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.named("script")) == 1
    assert len(page.named("style")) == 1
    assert all(
        set(image) <= {"src", "alt", "decoding", "draggable", "class"}
        for image in page.named("img")
    )
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    words = "".join(page.words)
    for prompt in HOSTILE:
        assert prompt in words


def test_the_policy_allows_the_page_s_own_script_and_style_only(page: Page) -> None:
    policy = next(m["content"] or "" for m in page.named("meta") if "http-equiv" in m)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2


def test_every_number_is_one_of_the_table(page: Page, results: Results) -> None:
    words = " ".join(page.words)
    for row in results.rows:
        for column in table.columns(results):
            assert column.cell(row).text in words
    assert "calibrated: false" in words
    assert "+1.5 % against the first time" in words


def test_sorting_values_are_exact(page: Page, results: Results) -> None:
    values = {attributes.get("data-value") for attributes in page.named("td")}
    for row in results.rows:
        assert row.speedup is None or str(row.speedup) in values


def test_a_row_without_pictures_says_why(page: Page) -> None:
    assert "No pictures of tensorrt-fp8: no TensorRT runtime" in " ".join(page.words)


def test_the_result_comes_first_and_the_command_after_it(tmp_path: Path) -> None:
    full = make_results(tmp_path, count=1, pictures=False)
    commanded = full.model_copy(update={"command": "hasten bench --recipes 'a <b>'"})
    text = html.report_page(commanded, Album("no pictures"))
    headline = "max, cache-compile and 4 others against the plain pipeline"
    titled = f"<title>{headline}: shape:flux.1-dev</title>"
    heading = f'<h1>{headline}</h1>\n  <p class="on">shape:flux.1-dev, 64 × 64, 50 steps'
    order = [titled, heading, "6.61× as fast", "<table", "<svg", "Pictures</h2>", "2.13.0+cu130"]
    places = [text.index(part) for part in [*order[:-1], "hasten bench --recipes", order[-1]]]
    assert places == sorted(places)
    assert "--recipes &#39;a &lt;b&gt;&#39;" in text
    assert "Command: hasten bench" in table.to_markdown(commanded)


def test_a_headline_counts_what_it_does_not_name(results: Results) -> None:
    baseline, compiled = results.rows[:2]
    alone = results.model_copy(update={"rows": (baseline,)})
    assert table.headline(alone) == "The plain pipeline alone"
    two = results.model_copy(update={"rows": (baseline, compiled)})
    assert table.headline(two) == "compile against the plain pipeline"
    three = results.model_copy(update={"rows": results.rows[:3]})
    assert table.headline(three) == "cache and compile against the plain pipeline"


def test_plots_follow_the_style_sheet_in_light_and_dark(page: Page) -> None:
    style = (plots.TEMPLATES / "report.css").read_text("utf-8")
    dark = style.split("prefers-color-scheme: dark", 1)[1]
    assert {kind.key for kind in KINDS.values()} | {"ink", "muted", "paper"} <= set(plots.COLOURS)
    assert all(f"--{name}: " in dark for name in plots.COLOURS)
    inside = [found for name, found in page.tags if name in ("path", "text", "use", "rect")]
    assert not any("style" in found or (found.get("fill") or "")[:1] == "#" for found in inside)
    assert {"var(--ours)", "var(--ink)"} <= {found.get("fill") for found in inside}


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for target in (attributes.get("aria-labelledby") or "").split():
            assert target in ids


def test_results_without_pictures_or_quality_still_make_a_page(tmp_path: Path) -> None:
    full = make_results(tmp_path, count=2, pictures=False)
    rows = tuple(row.model_copy(update={"quality": ()}) for row in full.rows)
    text = html.report_page(full.model_copy(update={"rows": rows}), Album("no pictures"))
    assert "No pictures were saved with these results." in text
    assert "Not drawn: no timed recipe has an LPIPS" in text


def test_a_failed_baseline_still_makes_a_page(tmp_path: Path) -> None:
    full = make_results(tmp_path, count=1, pictures=False)
    failed = Row(recipe="baseline", role="baseline", status="failed", reason="out of memory")
    text = html.report_page(full.model_copy(update={"rows": (failed,)}), Album("no pictures"))
    assert "No recipe was timed against the plain pipeline." in text
    assert "failed: out of memory" in text


def test_the_lede_names_this_library_s_fastest_and_its_cost(results: Results) -> None:
    assert html.lede(results) == (
        "The fastest recipe, max, takes 0.610 s per image, "
        "6.61× as fast as the plain pipeline (LPIPS 0.148, calibrated: false)."
    )


def test_a_graph_drawn_for_its_quality_is_neither_fastest_nor_in_a_chart(tmp_path: Path) -> None:
    scored = (quality(1, 0.011, 0.977, 32.0),)
    row = measured_row("graph", 0.1, 50, 1, (), quality=scored, role="graph", setup_seconds=77.7)
    full = make_results(tmp_path, count=1, pictures=False, extra_rows=(row,))
    assert "max" in html.lede(full)
    baseline, again, graph = full.rows[0], full.rows[-1], full.rows[-2]
    alone = full.model_copy(update={"rows": (baseline, graph, again)})
    assert html.lede(alone) == (
        "No recipe was timed against the plain pipeline. For its quality only: graph, LPIPS 0.0110."
    )
    text = html.report_page(alone, Album("no pictures"))
    assert "Not drawn, see the notes above: graph." in " ".join("".join(Page(text).words).split())
    assert "for its quality only: onnxruntime draws" in text
    assert "77.7" not in text
    assert '<tr class="kind-rule"' in text
    assert [row.recipe for row in plots.labelled_rows(alone)] == ["baseline"]


def test_kinds_follow_roles_and_not_names(tmp_path: Path) -> None:
    mine = measured_row("my-fewer-steps-idea", 0.1, 50, 1, ())
    results = make_results(tmp_path, count=1, pictures=False, extra_rows=(mine,))
    kinds = {row.recipe: KINDS[row.role] for row in results.rows}
    assert kinds["baseline"] is kinds["baseline-again"] is KINDS["baseline"]
    assert kinds["fewer-steps-18"] is KINDS["rival"]
    assert kinds["cache-dit-18"] is KINDS["peer"]
    assert kinds["max"] is kinds["my-fewer-steps-idea"] is KINDS["recipe"]
    assert "my-fewer-steps-idea" in html.lede(results)


def test_what_is_missing_to_judge_the_fastest_is_in_the_lede(tmp_path: Path) -> None:
    fast = measured_row("fast", 0.1, 50, 1, (), toml=f"name = 'fast'\n{CACHE}")
    full = make_results(tmp_path, count=1, pictures=False, extra_rows=(fast,))
    lede = html.lede(full)
    assert "Its rival, as few steps without the cache, was not measured." in lede
    once = with_speedups(full.workload, full.environment, full.rows[:-1])
    assert "The baseline was not rendered again" in html.lede(once)


def test_the_plain_pipeline_never_leads(tmp_path: Path) -> None:
    full = make_results(tmp_path, count=1, pictures=False)
    again = full.rows[-1].model_copy(update={"seconds_per_image": summarize_seconds([0.01])})
    drifted = with_speedups(full.workload, full.environment, (*full.rows[:-1], again))
    assert html.lede(drifted).startswith("The fastest recipe, max,")


def test_pictures_are_found_beside_the_results_file(folder: Path, tmp_path: Path) -> None:
    page = write_report(folder / "results.json", tmp_path / "elsewhere")
    assert page.parent == tmp_path / "elsewhere"
    assert "missing" not in page.read_text(encoding="utf-8")


def test_results_that_are_not_valid_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="workload"):
        write_report(tmp_path / "results.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_an_input_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(folder / "results.json", tmp_path / "file" / "out")
