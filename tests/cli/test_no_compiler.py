"""A whole benchmark on a machine that has no C++ compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.log import VERBOSITY
from hasten.results_file import read_results

BENCH = "import sys; from hasten.cli import main; sys.exit(main(['bench', *sys.argv[1:]]))"


@pytest.mark.slow
def test_recipes_that_compile_are_unsupported_and_the_rest_works(
    tmp_path: Path, saved_model: Path
) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    # OMP: what the rows' processes take, which share the machine with other tests.
    environment = {
        **{name: value for name, value in os.environ.items() if name not in VERBOSITY},
        "PATH": str(empty),
        "CXX": "/nonexistent/c++",
        "OMP_NUM_THREADS": "1",
    }
    options = ("--model", str(saved_model), "--device", "cpu", "--limit", "1", "--steps", "4")
    done = subprocess.run(
        [sys.executable, "-c", BENCH, *options, "--recipes", "compile,cache", "--out", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = read_results(tmp_path / "out" / "results.json")
    assert {row.recipe: row.status for row in results.rows} == {
        "baseline": "ok",
        "compile": "unsupported",
        "cache": "ok",
        "fewer-steps-3": "ok",
        "baseline-again": "ok",
    }
    (compiled,) = (row for row in results.rows if row.recipe == "compile")
    reason = str(compiled.reason)
    assert "needs a C++ compiler" in reason
    assert "apt-get install g++" in reason
    assert reason in done.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    said = {path.name: path.read_text("utf-8") for path in (tmp_path / "out" / "logs").iterdir()}
    assert len(said) == 5
    assert not [name for name, text in said.items() if "torchvision" in text or "Warning" in text]
