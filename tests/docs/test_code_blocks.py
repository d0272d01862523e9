"""The code of README and docs runs, page by page, in the order in which it is read."""

from __future__ import annotations

import ast
import io
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from hasten.cli import main
from hasten.cli.app import app
from hasten.machine import machine
from hasten.models.defaults import TINY_DIR
from hasten.recipe import Recipe, resolve
from tests.docs.code_blocks import FILE_COMMANDS, Block, commands, for_here, pages, problem_outside

PAGES = pages()
NAMED = [
    pytest.param(block, id=f"{page}-{index}")
    for page, here in PAGES.items()
    for index, block in enumerate(here)
]
# `bench` and `export`, which take a process per row and minutes, are parsed here: their own tests
# run them. What the others are given so that they are quick:
RUN = {
    "generate": [],
    "recipes": [],
    "layers": [],
    "doctor": [],
    "calibrate": ["--limit", "1", "--climb", "1"],
    "calibrate-scales": ["--limit", "1", "--steps", "4"],
}


def _runs(here: list[Block]) -> bool:
    """Whether there is anything on a page that is run and not only parsed."""
    return any(
        block.language == "python" or any(words[1] in RUN for words in _of_hasten(block))
        for block in here
        if not block.reason
    )


def _of_hasten(block: Block) -> Iterator[list[str]]:
    if block.language == "sh":
        yield from (words for words, _ in commands(block.code) if words[0] == "hasten")


def _needs_a_compiler(block: Block) -> bool:
    return "compile" in block.code and bool(machine().compile_problem("cpu"))


def _parse(words: list[str]) -> None:
    """Check the words of a command, its options and its recipes, without running it."""
    command: Any = typer.main.get_command(app)
    context = None
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)
    recipes = context.params.get("recipes") or context.params.get("recipe") or ""
    for name in recipes.split(","):
        if name and not name.endswith(".toml"):
            resolve(name)


def _is_read(words: list[str], page: str) -> bool:
    """Whether a page reads what a command writes; `calibrate` is slow and runs only then."""
    if not words[1].startswith("calibrate") or "--out" not in words:
        return True
    out = words[words.index("--out") + 1]
    commands_of_page = [other for block in PAGES[page] for other in _of_hasten(block)]
    return sum(out in other for other in commands_of_page) > 1


def _run(words: list[str], output: str) -> None:
    """Run a command in this process; what it prints goes where the shell's text says."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = main(words)
    assert code == 0, words
    if output:
        text = printed.getvalue()
        subprocess.run(["sh", "-c", f"cat {output}"], input=text, text=True, check=True)


@pytest.mark.parametrize("block", NAMED)
def test_every_block_is_valid(block: Block) -> None:
    if block.language == "python":
        ast.parse(block.code)
    elif block.language == "toml" and not block.reason:
        Recipe.from_toml(block.code)
    elif block.language == "sh":
        for words, _ in commands(block.code):
            if words[0] == "hasten":
                _parse(words[1:])
            elif not block.reason:
                assert problem_outside(words) is None, words


@pytest.fixture
def quick_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled model with a few steps as its default."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_DIR, folder)
    defaults = json.loads((TINY_DIR / "hasten.json").read_text("utf-8"))
    (folder / "hasten.json").write_text(json.dumps(defaults | {"steps": 6}), "utf-8")
    monkeypatch.setattr("hasten.models.defaults.TINY_DIR", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, here in PAGES.items() if _runs(here)])
def test_the_blocks_of_a_page_run(
    page: str, quick_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in PAGES[page]:
        if block.title:
            Path(block.title).write_text(block.code, "utf-8")
        if block.reason or _needs_a_compiler(block):
            continue
        if block.language == "python":
            code = for_here(block.code, str(quick_model))
            exec(compile(code, page, "exec"), names)
        elif block.language == "sh":
            for words, output in commands(for_here(block.code, "tiny")):
                if words[0] in FILE_COMMANDS:
                    subprocess.run(["sh", "-c", f"{shlex.join(words)} {output}"], check=True)
                elif words[0] == "hasten" and words[1] in RUN and _is_read(words, page):
                    _run([*words[1:], *RUN[words[1]]], output)
