"""The code in README and docs, made to run on a machine without a GPU or gated weights."""

from __future__ import annotations

import importlib.util
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.hooks import render

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\w*)(?P<title>[^\n]*)\n"
    r"(?P<code>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
MARKER = re.compile(r"<!-- not run: ([^\n]+) -->\s*\Z")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
FILE_COMMANDS = ("cp", "mkdir", "printf")


@dataclass(frozen=True)
class Block:
    """One block of code, as it stands on the page; reason: why it is not run, or empty."""

    language: str
    title: str
    code: str
    reason: str


def pages() -> dict[str, list[Block]]:
    """Every page that has code, by its path from the repository's root."""
    paths = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    found = {path.relative_to(ROOT).as_posix(): blocks(path) for path in paths}
    return {name: here for name, here in found.items() if here}


def blocks(path: Path) -> list[Block]:
    """The python, sh and toml blocks of a page in their order."""
    text = path.read_text("utf-8")
    if path.is_relative_to(DOCS):
        text = render(text)
    found = []
    for match in FENCE.finditer(text):
        if match["language"] in ("python", "sh", "toml"):
            marker = MARKER.search(text[: match.start()])
            title = re.search(r'title="([^"]+)"', match["title"])
            code = textwrap.dedent(match["code"])
            reason = marker[1] if marker else ""
            found.append(Block(match["language"], title[1] if title else "", code, reason))
    return found


def for_here(code: str, model: str) -> str:
    """The code with `model` for the gated one, the CPU for the GPU, small images, few steps."""
    code = code.replace("black-forest-labs/FLUX.1-dev", model)
    code = re.sub(r"\b(?:512|1024)x(?:512|1024)\b", "128x128", code)
    code = re.sub(r"\b(height|width)=\d+", r"\1=128", code)
    code = re.sub(r"(num_inference_steps=)\d+", r"\g<1>6", code).replace("--steps 50", "--steps 20")
    return re.sub(r'(["\s=])cuda\b', r"\1cpu", code)


def commands(code: str) -> Iterator[tuple[list[str], str]]:
    """Each command without comments: its words, and what its output goes to as shell text."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
        lexer.whitespace_split = True
        words = list(lexer)
        end = next((i for i, word in enumerate(words) if word in ("|", ">", ">>")), len(words))
        if words:
            quoted = (word if word in ("|", ">", ">>") else shlex.quote(word) for word in words)
            yield words[:end], " ".join(list(quoted)[end:])


def problem_outside(words: list[str]) -> str | None:
    """What is wrong with a command that is not hasten's."""
    if words[0] in FILE_COMMANDS:
        return None
    match words:
        case ["make", *rest]:
            targets = [word for word in rest if "=" not in word]
            return None if set(targets) <= TARGETS else f"no such target: {targets}"
        case ["pip", "install", *rest]:
            extras = re.findall(r"\[(\w+)\]", " ".join(rest))
            missing = set(extras) - set(EXTRAS["optional-dependencies"])
            return f"no such extra: {missing}" if missing else None
        case ["python", "-m", module, *_] if module.startswith("studies"):
            return None if importlib.util.find_spec(module) else f"no such module: {module}"
    return "cannot be checked: mark the block with <!-- not run: REASON -->"
