"""The commands by name, and how each run of the program ends."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from hasten import __version__
from hasten.cli.bench import bench
from hasten.cli.calibrate import calibrate, calibrate_scales
from hasten.cli.doctor import doctor
from hasten.cli.export import export
from hasten.cli.failure import explain
from hasten.cli.generate import generate
from hasten.cli.layers import layers
from hasten.cli.recipes import recipes
from hasten.errors import InputError
from hasten.library_logging import quiet_libraries

OLD_SPELLINGS = (  # command, option, the command that took its place
    ("doctor", "--layers", "layers"),
    ("calibrate", "--activations", "calibrate-scales"),
)

app = typer.Typer(
    name="hasten",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(bench)
app.command()(calibrate)
app.command("calibrate-scales")(calibrate_scales)
app.command()(layers)
app.add_typer(export, name="export")
app.add_typer(recipes, name="recipes")
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hasten {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def hasten(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Make diffusion-transformer pipelines fast, and say what the speed cost in quality."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 ok, 1 failure, 2 bad usage or bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    quiet_libraries(debug="--debug" in arguments)
    try:
        return _run(arguments)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        failure = explain(error)
        for line in failure.lines():
            print(line, file=sys.stderr)
        return failure.exit_code


def _refuse_old_spelling(arguments: list[str]) -> None:
    for command, option, name in OLD_SPELLINGS:
        if arguments[:1] == [command] and option in arguments:
            others = [argument for argument in arguments[1:] if argument != option]
            raise InputError(
                f"`hasten {command} {option}` is a command of its own, `hasten {name}`",
                f"hasten {shlex.join([name, *others])}",
            )


def _run(arguments: list[str]) -> int:
    _refuse_old_spelling(arguments)
    command = typer.main.get_command(app)
    try:
        # Not `command.main()`: it would print usage errors and Ctrl-C in its own form.
        with command.make_context("hasten", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    finally:
        sys.stdout.flush()
    return 0
