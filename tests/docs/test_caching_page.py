"""The tables of the caching page are the committed ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hasten.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "caching.md"
TABLES = re.findall(
    r"<!-- results: ([\w/-]+) -->\n(.*?)<!-- end of results -->",
    PAGE.read_text("utf-8"),
    re.DOTALL,
)


@pytest.mark.parametrize(("name", "shown"), TABLES, ids=[name for name, _ in TABLES])
def test_its_tables_are_the_committed_ones(name: str, shown: str) -> None:
    report = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text("utf-8")
    table = report.split("\n## ")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert rows == [line for line in table.splitlines() if line.startswith("|")]


def test_its_recipes_are_valid() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert Recipe.from_toml(block).cache is not None


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text("utf-8")):
        assert (PAGE.parent / link).exists(), link
