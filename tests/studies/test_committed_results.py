"""Every results file that the studies committed can be read, and its table is the product's."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.report import table
from hasten.results_file import read_results

ROOT = Path(__file__).parents[2] / "studies" / "results"
FILES = sorted(ROOT.glob("**/results.json"))
STUDIES = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("peers", "caching")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_a_committed_file_is_valid(path: Path) -> None:
    assert read_results(path).rows[0].role == "baseline"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_the_table_beside_it_is_that_of_its_numbers(path: Path) -> None:
    text = path.with_name("table.md").read_text("utf-8")
    assert text == table.to_markdown(read_results(path))
