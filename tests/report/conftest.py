from __future__ import annotations

from pathlib import Path

import pytest

from hasten.report import write_report
from hasten.results import Results
from hasten.results_file import read_results
from tests.report.builders import make_results


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of four prompts with its report beside it; tests only read it."""
    directory = tmp_path_factory.mktemp("bench")
    make_results(directory, count=4, size=(96, 96))
    write_report(directory / "results.json", directory)
    return directory


@pytest.fixture(scope="session")
def results(folder: Path) -> Results:
    return read_results(folder / "results.json")
