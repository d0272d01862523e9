"""What the page about troubleshooting quotes is what the sources raise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
QUOTED = [
    line.removeprefix("error: ").removeprefix("fix: ")
    for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
LEAST = 12  # characters that a text of the sources must have of its own to count


def _texts(node: ast.AST) -> Iterator[str]:
    """The string literals below a node as regular expressions; what is filled in is anything."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr):
            parts = child.values
            own = "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
            if len(own) >= LEAST:
                yield "".join(
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*"
                    for part in parts
                )
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            if len(child.value) >= LEAST:
                yield re.escape(child.value)
            continue
        yield from _texts(child)


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    files = sorted((ROOT / "src" / "hasten").rglob("*.py"))
    texts = {text for file in files for text in _texts(ast.parse(file.read_text("utf-8")))}
    return tuple(re.compile(text) for text in sorted(texts))


def _covered(line: str) -> int:
    """How many characters of a line the longest text of the sources that is in it matches."""
    return max((len(found[0]) for one in _patterns() if (found := one.search(line))), default=0)


@pytest.mark.parametrize("line", QUOTED)
def test_each_quoted_line_is_in_the_sources(line: str) -> None:
    shown = line.partition("…")[0]
    assert _covered(line) >= 0.6 * len(shown), line


def test_a_line_that_nothing_raises_is_noticed() -> None:
    assert _covered("the frobnicator is out of tune") == 0


def test_there_is_something_to_quote() -> None:
    assert len(QUOTED) > 40
