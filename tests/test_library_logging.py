"""Libraries are silent in hasten's own processes, and as they were everywhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.library_logging import VERBOSITY, quiet_libraries

LOUD = {name: value for name, value in os.environ.items() if name not in VERBOSITY}


def ended(program: str, *arguments: str, cwd: Path | None = None) -> tuple[str, str]:
    """What a Python program printed to stdout and stderr, the libraries' verbosity unset."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=LOUD,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


def test_the_environment_decides_before_us(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = VERBOSITY
    for name in VERBOSITY:
        monkeypatch.setenv(name, "info")
    monkeypatch.delenv(ours)
    quiet_libraries(debug=True)
    assert (os.environ[ours], os.environ[theirs]) == ("warning", "info")
    quiet_libraries()
    assert (os.environ[ours], os.environ[theirs]) == ("warning", "info")


def test_importing_hasten_silences_nothing() -> None:
    program = """
import logging, os, warnings
import torch, diffusers, transformers
before = dict(os.environ), list(warnings.filters), logging.getLogger("diffusers").level
import hasten, hasten.apply, hasten.cli, hasten.benchmark.row, hasten.models.load
assert before == (dict(os.environ), warnings.filters, logging.getLogger("diffusers").level)
"""
    ended(program)


GENERATE = "import sys; from hasten.cli import main; sys.exit(main(['generate', *sys.argv[1:]]))"


def test_generate_prints_its_own_lines_only(saved_model: Path, tmp_path: Path) -> None:
    # float16 on a CPU is what Diffusers warns of, four times.
    options = ("--model", str(saved_model), "--dtype", "float16", "--device", "cpu")
    out, err = ended(GENERATE, "a red kite", *options, cwd=tmp_path)
    assert out.startswith("hasten.png: 32x32, recipe cache")
    assert len(out.splitlines()) == 1
    assert err == ""


def test_words_that_were_cut_off_are_still_named(saved_model: Path, tmp_path: Path) -> None:
    prompt = "red kite " * 6  # 12 tokens, of which the model's defaults take 8
    _, err = ended(GENERATE, prompt, "--model", str(saved_model), "--device", "cpu", cwd=tmp_path)
    assert len(err.splitlines()) == 1
    assert "truncated because `max_sequence_length`" in err
