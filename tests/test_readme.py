"""Each way in the README takes under ten lines; its links and tables hold. What runs it: docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- not run: [^\n]*-->\n)?```python\n(.*?)```", re.DOTALL)
BLOCKS = [(bool(skipped), code) for skipped, code in BLOCK.findall(README.read_text("utf-8"))]


def recipe_of(code: str) -> str:
    found = re.search(r'optimize\(pipe, "?([\w-]+)', code)
    return found.group(1) if found else ""


def test_every_way_is_shown_in_under_ten_lines() -> None:
    shown = [recipe_of(code) for _, code in BLOCKS]
    assert shown == ["baseline", "compile", "cache", "cache-compile", "recipe"]
    for _, code in BLOCKS:
        assert len(code.splitlines()) < 10


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text("utf-8"))
    assert links
    for link in links:
        assert (README.parent / link).exists(), link


TABLES = re.findall(
    r"<!-- results: ([\w-]+) -->\n(.*?)<!-- end of results -->",
    README.read_text("utf-8"),
    re.DOTALL,
)


@pytest.mark.parametrize(("name", "shown"), TABLES, ids=[name for name, _ in TABLES])
def test_the_table_is_the_committed_one(name: str, shown: str) -> None:
    committed = README.parent / "studies" / "results" / name / "table.md"
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    lines = committed.read_text("utf-8").splitlines()
    assert len(rows) > 5
    assert rows == [line for line in lines if line.startswith("|")][: len(rows)]
