"""Write docs/cli.md from the commands themselves: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from hasten.cli.app import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

`docs/make_cli.py` writes this page from the commands; `make docs` runs it.

| command | what it does |
| --- | --- |"""
OPTIONS = """
| option | meaning | default |
| --- | --- | --- |"""
TAIL = """
## Exit codes

| code | meaning |
| --- | --- |
| 0 | success |
| 1 | failure |
| 2 | bad usage or bad input |
| 130 | ended by Ctrl-C or SIGTERM |

Everything that is wrong with the input is reported at once on stderr, before anything is loaded
or written: one `error:` line per fault, and a `fix:` line."""


def page() -> str:
    """The whole page as Markdown."""
    commands = dict(leaves(typer.main.get_command(app), "hasten"))
    lines = [HEAD]
    for name, command in commands.items():
        summary = command.help.strip().partition("\n\n")[0]
        lines.append(row(f"[`{name}`](#{name.replace(' ', '-')})", one_line(summary)))
    for name, command in commands.items():
        lines += section(name, command)
    return "\n".join([*lines, TAIL, ""])


def section(name: str, command: Any) -> Iterator[str]:
    """Usage, help and options of one command."""
    kinds: dict[str, list[Any]] = {"argument": [], "option": []}
    for parameter in command.params:
        kinds[parameter.param_type_name].append(parameter)
    arguments = [word(parameter) for parameter in kinds["argument"]]
    yield f"\n## {name}\n"
    yield f"`{' '.join([name, *arguments, '[OPTIONS]'])}`\n"
    yield "\n\n".join(one_line(part) for part in command.help.strip().split("\n\n"))
    described = [parameter for parameter in kinds["argument"] if parameter.help]
    if described or kinds["option"]:
        yield OPTIONS
    yield from (row(f"`{word(parameter)}`", parameter.help, "") for parameter in described)
    yield from (row(*cells_of(parameter)) for parameter in kinds["option"])


def word(argument: Any) -> str:
    """An argument as it stands in the usage."""
    return argument.name.upper() if argument.required else f"[{argument.name.upper()}]"


def one_line(text: str) -> str:
    return " ".join(text.split())


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command below this one with the words that call it."""
    below = getattr(command, "commands", {})
    if not below:
        yield name, command
    for word, inner in below.items():
        yield from leaves(inner, f"{name} {word}")


def cells_of(option: Any) -> tuple[str, str, str]:
    meaning, _, default = option.help.rstrip("]").partition("  [default: ")
    if not default and option.default is not None and option.default is not False:
        default = f"`{option.default}`"
    if option.required:
        default = "required"
    return f"`{' '.join([option.opts[0], option.metavar or '']).strip()}`", meaning, default


def row(*cells: str) -> str:
    escaped = (one_line(cell).replace("|", r"\|") for cell in cells)  # else it begins a new cell
    return f"| {' | '.join(escaped)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
