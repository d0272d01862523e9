"""The page about quantisation: its recipes are valid, its links and numbers hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev

from studies.linears import encoder_table, linears_table
from studies.quantization import blocks_table, text_table

from hasten.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"
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


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / link).exists(), link


def test_its_tables_come_from_the_results() -> None:
    results = PAGE.parents[1] / "studies" / "results" / "quantization" / "tiny.json"
    rows = json.loads(results.read_text("utf-8"))["rows"]
    assert blocks_table(rows) in TEXT
    assert text_table(rows) in (PAGE.parent / "text-and-decoder.md").read_text("utf-8")


def test_its_times_come_from_the_results() -> None:
    results = PAGE.parents[1] / "studies" / "results" / "quantization" / "h100-linears.json"
    measured = json.loads(results.read_text("utf-8"))
    assert linears_table(measured["rows"]) in TEXT
    assert encoder_table(measured["text"]) in (PAGE.parent / "text-and-decoder.md").read_text()


def test_emulation_beside_the_gpu_comes_from_the_results() -> None:
    results = PAGE.parents[1] / "studies" / "results" / "quantization"

    def scores(file: str, recipe: str) -> list[float]:
        rows = json.loads((results / file).read_text("utf-8"))["rows"]
        (row,) = [row for row in rows if row["recipe"] == recipe]
        return [one["lpips"] for one in row["quality"][0]["per_prompt"]]

    emulated = scores("cpu-fp8-emulated.json", "fp8-emulated")
    real = scores("h100-fp8.json", "fp8")
    differences = [one - other for one, other in zip(emulated, real, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences))
    assert f"{len(real)} prompts, LPIPS {fmean(emulated):.4f} emulated" in TEXT
    assert f"{fmean(real):.4f} with preset `fp8`" in TEXT
    assert f"{fmean(differences):.4f} ± {error:.4f}" in TEXT
    assert abs(fmean(differences)) < 2 * error
