"""The page about the command line says what the commands say."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_page_is_current() -> None:
    made = runpy.run_path(str(DOCS / "make_cli.py"))["page"]()
    assert (DOCS / "cli.md").read_text("utf-8") == made, "run `make docs`"
    for words in (
        "`hasten recipes check NAME [OPTIONS]`",
        "`--size WxH`",
        "the model's",
        "`--seed N`",
    ):
        assert words in made
