"""The README's figures, and spans that pages give in words, come from the results."""

from __future__ import annotations

import json
from pathlib import Path

from docs.make_readme import with_table

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "studies" / "results" / "peers"
README = (ROOT / "README.md").read_text("utf-8")


def test_the_readmes_table_comes_from_the_results() -> None:
    assert with_table(README) == README


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
    files = sorted((PEERS / run).glob("1024*/results.json"))
    rows = [row for file in files for row in json.loads(file.read_text("utf-8"))["rows"]]
    (row,) = [row for row in rows if row["recipe"] == name]
    return float(row["first_image_seconds"] - row["seconds_per_image"]["median"])
