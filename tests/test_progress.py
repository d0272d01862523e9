"""Bars: where somebody can see them, and what moves them."""

from __future__ import annotations

import sys

import pytest

from hasten.progress import bar, shown


def test_a_pipe_gets_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    with shown(None) as progress:
        progress("rendering", 1, 8)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown(None) as progress:
        progress("rendering", 1, 8)
    err = capsys.readouterr().err
    assert "rendering 1/8" in err
    assert "\n" not in err
    assert bar("loading", 4, wanted=False).disable


def test_a_function_of_the_callers_gets_what_is_reported() -> None:
    said: list[tuple[str, int, int]] = []
    with shown(lambda *what: said.append(what)) as progress:
        progress("rendering", 1, 8)
    assert said == [("rendering", 1, 8)]
