"""Write docs/cli.md from the commands themselves: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from hasten.cli.app import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Written by docs/make_cli.py from the commands themselves; `make docs` writes it anew.

| command | what it does |
| --- | --- |"""
OPTIONS = """
| option | what it means | default | commands |
| --- | --- | --- | --- |"""
TAIL = """
Exit codes: 0 ok, 1 failure, 2 bad usage or bad input, 130 after Ctrl-C or SIGTERM. What is
wrong with the input is said all at once on stderr, one `error:` line each and one `fix:` line,
before anything is loaded or written."""


def page() -> str:
    """The whole page as Markdown."""
    commands = dict(leaves(typer.main.get_command(app), "hasten"))
    lines = [HEAD]
    for name, command in commands.items():
        arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
        lines.append(row(f"`{' '.join([name, *arguments])}`", command.help))
    lines.append(OPTIONS)
    for cells, users in options(commands).items():
        everywhere = len(users) == len(commands)
        lines.append(row(*cells, "all" if everywhere else ", ".join(users)))
    return "\n".join([*lines, TAIL, ""])


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command below this one with the words that call it."""
    below = getattr(command, "commands", {})
    if not below:
        yield name, command
    for word, inner in below.items():
        yield from leaves(inner, f"{name} {word}")


def options(commands: dict[str, Any]) -> dict[tuple[str, str, str], list[str]]:
    """Cells of each option -> the commands that have it. One name can mean different things."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, command in commands.items():
        for option in command.params:
            if option.param_type_name == "option":
                found.setdefault(cells_of(option), []).append(name.removeprefix("hasten "))
    return found


def cells_of(option: Any) -> tuple[str, str, str]:
    meaning, _, default = option.help.rstrip("]").partition("  [default: ")
    if not default and option.default is not None and option.default is not False:
        default = f"`{option.default}`"
    return f"`{' '.join([option.opts[0], option.metavar or '']).strip()}`", meaning, default


def row(*cells: str) -> str:
    escaped = (cell.replace("|", r"\|") for cell in cells)  # else it would begin a new cell
    return f"| {' | '.join(escaped)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
