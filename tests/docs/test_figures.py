"""The README's figures, and spans that pages give in words, come from the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from studies.peers.card import card

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "studies" / "results" / "peers"
README = (ROOT / "README.md").read_text("utf-8")


def test_the_readmes_figures_come_from_the_results() -> None:
    (sentence,) = re.findall(r"On one H100 at 1024×1024.*?\n\n", README, re.DOTALL)
    figures = re.findall(r"`(\w+)` ([\d.]+) s\s\(([\d.]+)×\)", sentence)
    assert [name for name, *_ in figures] == ["lossless", "fp8", "balanced", "max"]
    at_1024 = card().split("\n\n")[1]
    for name, seconds, ratio in figures:
        assert re.search(rf"\| `{name}` \| \d+ \| {seconds} \| {ratio} \|", at_1024), name


def test_the_readmes_peer_comes_from_the_results() -> None:
    found = re.search(r"`balanced` is ([\d.]+) times \(512×512\) and ([\d.]+) times", README)
    assert found is not None
    peers = card().split("\n\n")[2]
    (row,) = re.findall(r"\| `balanced` \| [\d.]+ \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", peers)
    assert found.groups() == row


def test_the_readmes_int8_comes_from_the_results() -> None:
    beside = re.search(
        r"Beside `fp8`'s ([\d.]+) s in a run of their own,\n`int8` took ([\d.]+) s", README
    )
    lpips = re.search(
        r"a twelfth of its LPIPS on the bundled model \(([\d.]+) against ([\d.]+)\)", README
    )
    assert beside is not None
    assert lpips is not None
    *_, codes, _, quality = card().split("\n\n")
    seconds = dict(re.findall(r"\| `(\w+)` \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|", codes))
    assert beside.groups() == (seconds["fp8"], seconds["int8"])
    scores = {name: float(value) for name, value in re.findall(r"\| `(\w+)` \| ([\d.]+)", quality)}
    assert lpips.groups() == (f"{scores['int8']:.4f}", f"{scores['fp8']:.4f}")
    assert round(scores["fp8"] / scores["int8"]) == 12


def test_what_a_second_size_costs_comes_from_the_results() -> None:
    presets, peers = (
        " ".join((ROOT / "docs" / page).read_text("utf-8").split())
        for page in ("presets.md", "peers.md")
    )
    own = [
        _extra("h100-presets", f"hasten:{name}") for name in ("lossless", "fp8", "balanced", "max")
    ]
    own.append(_extra("h100-int8", "hasten:int8"))
    assert f"costs {min(own):.1f} to {max(own):.1f} s more" in presets
    compiled = _extra("h100-presets", "diffusers-compile")
    assert f"and {compiled:.0f} s for the second resolution" in presets
    skipping = _extra("h100-fastest-peer", "cache-dit-fp8-untuned:17")
    computing = _extra("h100-fp8-peer", "diffusers-torchao-fp8:untuned")
    assert f"{skipping:.0f} s and {computing:.0f} s more at the second size" in peers


def _extra(run: str, name: str) -> float:
    """Seconds that the first image at 1024×1024, the second size, takes more than a later one."""
    if (file := PEERS / f"{run}.json").is_file():  # all sizes and groups in one file
        rows = json.loads(file.read_text("utf-8"))["rows"]
        (size,) = [row["sizes"]["1024"] for row in rows if row["row"] == name]
        return float(size["first_image_seconds"] - size["seconds"]["median"])
    files = sorted((PEERS / run).glob("1024*/results.json"))
    rows = [row for file in files for row in json.loads(file.read_text("utf-8"))["rows"]]
    (row,) = [row for row in rows if row["recipe"] == name]
    return float(row["first_image_seconds"] - row["seconds_per_image"]["median"])
