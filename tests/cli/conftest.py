"""Running commands in this process, and engines to run them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hasten.cli import main
from hasten.log import VERBOSITY


class Ended(NamedTuple):
    """How a command ended: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def fixes(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("fix: ")]


Run = Callable[..., Ended]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`run("recipes", "list")` in an empty directory; what it does to the environment is undone."""
    monkeypatch.chdir(tmp_path)
    for name in VERBOSITY:
        monkeypatch.setenv(name, "error")

    def command(*arguments: object) -> Ended:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ended(code, *capfd.readouterr())

    return command


@pytest.fixture
def small_model(
    monkeypatch: pytest.MonkeyPatch, saved_model: Path, make_pipe: Callable[[], Any]
) -> None:
    """The bundled model is the small random pipeline; the engine is the real one."""
    monkeypatch.setattr("hasten.models.defaults.TINY_DIR", saved_model)
    monkeypatch.setattr("hasten.models.load_pipeline", lambda *_args, **_options: make_pipe())
