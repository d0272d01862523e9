"""The page about quantisation: its recipes are valid, and what it says of emulation holds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev

from hasten.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "passes" / "quantize.md"
TEXT = PAGE.read_text("utf-8")


def test_its_recipes_are_valid() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert Recipe.from_toml(block).quantize is not None


def test_it_names_every_scheme() -> None:
    schemes = Recipe.json_schema()["$defs"]["Quantize"]["properties"]["scheme"]["enum"]
    for scheme in schemes:
        assert f"| `{scheme}` |" in TEXT


def test_emulation_compared_with_the_gpu_comes_from_the_results() -> None:
    results = PAGE.parents[2] / "studies" / "results" / "quantization"

    def scores(file: str, recipe: str) -> list[float]:
        rows = json.loads((results / file).read_text("utf-8"))["rows"]
        (row,) = [row for row in rows if row["recipe"] == recipe]
        return [one["lpips"] for one in row["quality"][0]["per_prompt"]]

    emulated = scores("cpu-fp8-emulated.json", "fp8-emulated")
    real = scores("h100-fp8.json", "fp8")
    differences = [one - other for one, other in zip(emulated, real, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences))
    assert f"over {len(real)} prompts" in TEXT
    assert f"{fmean(differences):.4f} ± {error:.4f}" in TEXT
    assert abs(fmean(differences)) < 2 * error
