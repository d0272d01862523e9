"""The page about speed: its recipes are valid, its links lead somewhere, its presets exist."""

from __future__ import annotations

import re
from pathlib import Path

from studies.peers.card import card, measured, median_of

from hasten.recipe import Recipe, preset_names
from hasten.results import Row

PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
TEXT = PAGE.read_text("utf-8")


def test_its_recipes_are_valid() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert Recipe.from_toml(block).fuse is not None


def test_its_presets_exist() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", TEXT.partition("## Measured")[0], re.MULTILINE)
    assert rows == ["lossless", "int8", "fp8", "balanced", "max"]
    assert set(rows) <= set(preset_names())


def test_its_python_is_valid() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    compile(code, str(PAGE), "exec")


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (PAGE.parent / link).exists(), link


def test_its_tables_come_from_the_results() -> None:
    (tables,) = re.findall(
        r"<!-- results: peers -->\n(.*?)\n<!-- end of results -->", TEXT, re.DOTALL
    )
    assert tables == card()


def test_what_compiling_the_decoder_brings_comes_from_the_results() -> None:
    names = "hasten:balanced", "hasten:benchmarks/peers/recipes/balanced-decoder.toml"

    def saved(size: str) -> float:
        plain, decoder = (measured("h100-fp8-peer", size)[name] for name in names)
        return 1e3 * (median_of(plain) - median_of(decoder))

    def first(row: Row) -> float:
        """From weights on the device to the first image."""
        assert row.setup_seconds is not None
        assert row.first_image_seconds is not None
        return row.setup_seconds - row.extra["load s"] + row.first_image_seconds

    plain, decoder = (measured("h100-fp8-peer", "512")[name] for name in names)

    text = (PAGE.parent / "text-and-decoder.md").read_text("utf-8")
    assert f"takes {saved('512'):.0f} ms off an image at 512×512 and {saved('1024'):.0f} ms" in text
    assert f"adds\n  {first(decoder) - first(plain):.0f} s to the first one" in text


def test_the_readmes_figures_come_from_the_results() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text("utf-8")
    (sentence,) = re.findall(r"On one H100 at 1024×1024.*?\n\n", readme, re.DOTALL)
    figures = re.findall(r"`(\w+)` ([\d.]+) s\s\(([\d.]+)×\)", sentence)
    assert [name for name, *_ in figures] == ["lossless", "fp8", "balanced", "max"]
    at_1024 = card().split("\n\n")[1]
    for name, seconds, ratio in figures:
        assert re.search(rf"\| `{name}` \| \d+ \| {seconds} \| {ratio} \|", at_1024), name


def test_the_readmes_peer_comes_from_the_results() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text("utf-8")
    found = re.search(r"`balanced` is ([\d.]+) times \(512×512\) and ([\d.]+) times", readme)
    assert found is not None
    peers = card().split("\n\n")[2]
    (row,) = re.findall(r"\| `balanced` \| [\d.]+ \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", peers)
    assert found.groups() == row


def test_the_readmes_int8_comes_from_the_results() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text("utf-8")
    beside = re.search(
        r"Beside `fp8`'s ([\d.]+) s in a run of their own,\n`int8` took ([\d.]+) s", readme
    )
    lpips = re.search(
        r"a twelfth of its LPIPS on the bundled model \(([\d.]+) against ([\d.]+)\)", readme
    )
    assert beside is not None
    assert lpips is not None
    *_, codes, _, quality = card().split("\n\n")
    seconds = dict(re.findall(r"\| `(\w+)` \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|", codes))
    assert beside.groups() == (seconds["fp8"], seconds["int8"])
    scores = {name: float(value) for name, value in re.findall(r"\| `(\w+)` \| ([\d.]+)", quality)}
    assert lpips.groups() == (f"{scores['int8']:.4f}", f"{scores['fp8']:.4f}")
    assert round(scores["fp8"] / scores["int8"]) == 12
