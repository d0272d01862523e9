"""Messages, docstrings, pages and names use the common words of the field."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "hasten"

PAGES = ("README.md", "docs/**/*.md")

PER = "row|token|tensor|channel|step|image|picture|shape|run|call|process|program|block|layer|side"
PHRASES = (
    *(r"\bdeclin", r"\bnearer\b", r"\banew\b", r"\bbeside\b", r"\bmade whole\b", r"\bis fed\b"),
    *(r"\bmood\b", r"\blets? go of\b", r"\bfor want of\b", r"\breally\b", r"\bhonest rival"),
    *(r"\bhears?\b", r"\bknows\b", r"\bhas no say\b"),
    rf"\b(once|one|scales?|seconds|pixels|bytes|programs?|products?) an? ({PER})\b",
    rf"\bone \w+ an? ({PER})\b",
)
"""What the prose may not say: see the words in their place, such as "per row" and "closer"."""

NAMES = {
    *("answer", "answers", "ask", "asked", "chatter", "declined", "found", "hearing", "home"),
    *("keeps", "left_alone", "mood", "question", "stuck", "tell", "tells", "told", "trouble"),
    *("twins", "what"),
}
FORMATS = {("manifest.py", "what"), ("verify.py", "what")}  # names in files that were written
OF_LIBRARIES = {("Path", "home")}
PROSE = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))


def _sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def _pages() -> list[Path]:
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


def _tokens(path: Path) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)


def phrases_in(text: str) -> list[str]:
    """Each phrase of PHRASES that a text has, also where it is broken over lines."""
    joined = re.sub(r"[\s\"'`#*]+", " ", text)
    return [match[0] for phrase in PHRASES for match in re.finditer(phrase, joined, re.I)]


def names_in(path: Path) -> list[str]:
    """Each identifier of NAMES that a module uses."""
    names = [token.string for token in _tokens(path) if token.type in (tokenize.NAME, tokenize.OP)]
    owners = ["", "", *names]
    return [
        name
        for owner, name in zip(owners, names, strict=False)
        if name in NAMES and (path.name, name) not in FORMATS and (owner, name) not in OF_LIBRARIES
    ]


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_modules_use_the_words_of_the_field(path: Path) -> None:
    tokens = [token for token in _tokens(path) if token.type in PROSE]
    prose = " ".join(token.string.removeprefix("f") for token in tokens)
    assert phrases_in(prose) == []
    assert names_in(path) == []


@pytest.mark.parametrize("path", _pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_use_the_words_of_the_field(path: Path) -> None:
    assert phrases_in(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "text",
    ["one scale a row", "Once a shape", "4.3 seconds an image", "made\n  anew", "it knows no FP8"],
)
def test_the_phrases_are_found(text: str) -> None:
    assert phrases_in(text)


def test_the_names_are_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("found = Path.home()\nself.what, home = 1, found.home\n")
    assert names_in(module) == ["found", "what", "home", "found", "home"]
