"""The table and the plot of all budgets, from small results."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies.caching.figure import markdown, read_budgets, write_figure
from studies.caching.results import failed_row, put

from tests.studies.caching.test_results import ENVIRONMENT, WORKLOAD, scored


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recipe = scored("recipe:mine.toml", {"recipe": "mine.toml", "toml": 'name = "mine"'}, 0.01)
    mag = scored("MagCache", {"threshold": 0.1}, 0.02)
    put(tmp_path / "tiny-25", WORKLOAD, ENVIRONMENT, [mag])
    put(tmp_path / "tiny-17", WORKLOAD, ENVIRONMENT, [recipe, failed_row("MagCache", "too dear")])
    put(tmp_path / "tiny-as-57-blocks-17", WORKLOAD, ENVIRONMENT, [mag])
    return tmp_path


def test_table_has_the_best_of_each_budget_in_bold(folder: Path) -> None:
    budgets = read_budgets(folder, "tiny")
    assert list(budgets) == [25, 17]
    text = markdown(budgets)
    assert "| MagCache | diffusers | **0.02000** | – |" in text
    assert "| recipe:mine.toml | hasten | – | **0.01000** |" in text


def test_plot_and_table_are_written_beside_the_results(folder: Path) -> None:
    write_figure(folder, "tiny")
    assert (folder / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny.png" in (folder / "tiny.md").read_text("utf-8")


def test_a_budget_that_nothing_was_measured_at_is_a_column_of_dashes(folder: Path) -> None:
    put(folder / "tiny-10", WORKLOAD, ENVIRONMENT, [failed_row("MagCache", "killed")])
    text = markdown(read_budgets(folder, "tiny"))
    assert "| MagCache | diffusers | **0.02000** | – | – |" in text
