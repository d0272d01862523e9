"""The commands by name, and how each run of the program ends.

A failure is one line per fault and one line for the fix.
"""

from __future__ import annotations

import errno
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hasten import __version__
from hasten.cli.bench import bench_command
from hasten.cli.calibrate import calibrate_command, calibrate_scales
from hasten.cli.doctor import doctor
from hasten.cli.export import export
from hasten.cli.generate import generate
from hasten.cli.layers import layers
from hasten.cli.recipes import recipes
from hasten.cli.terminal import discard_stdout, prepare_streams, print_text
from hasten.errors import HastenError, InputError
from hasten.log import quiet_libraries
from hasten.memory import ran_out
from hasten.process import terminable

# Typer may or may not bring its own copy of click; either way this is the base of usage errors.
UsageError: Any = typer.BadParameter.__base__

LESS_MEMORY = (
    "use a smaller --size, --dtype bfloat16, or on a GPU, where the recipe has no [offload] yet, "
    '[offload] kind = "model"'
)

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
app.command("bench")(bench_command)
app.command("calibrate")(calibrate_command)
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


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and print what it raises. Returns the exit code, see `Failure`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    quiet_libraries(debug="--debug" in arguments)
    try:
        with terminable():
            return _run(arguments)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        discard_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        failure = _explained(error)
        for part in failure.parts:
            print_text("\n".join(part.lines("error: ")), error=True)
        discard_stdout(only_if_unwritable=True)
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


class _Failure(HastenError):
    """What an error of any other kind means to someone at a terminal."""

    def __init__(self, fault: str, fix: str, exit_code: int = 1) -> None:
        super().__init__(fault, fix)
        self.exit_code = exit_code


def _explained(error: BaseException) -> HastenError:
    """Its exit code is 1 for a failure, 2 for bad usage or input, 130 for Ctrl-C or SIGTERM."""
    if isinstance(error, HastenError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return _Failure("interrupted", str(error), 130)
    if isinstance(error, UsageError):
        command = error.ctx.command_path if error.ctx else "hasten"
        return _Failure(str(error.format_message()).rstrip("."), f"see `{command} --help`", 2)
    if ran_out(error):
        return _Failure(_with_message("out of memory", error), LESS_MEMORY)
    if isinstance(error, OSError) and error.strerror:
        return _of_the_system(error)
    return _Failure(
        _with_message(f"unexpected {type(error).__name__}", error),
        "run again with --debug for the traceback and report it",
    )


def _of_the_system(error: OSError) -> HastenError:
    """A full disk, a vanished folder, missing rights: nothing that a traceback would explain."""
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free some disk space" if full else "check that it can be read and written"
    return _Failure(f"{where}{error.strerror}", f"{fix}, then run again")


def _with_message(text: str, error: BaseException) -> str:
    message = str(error).strip().partition("\n")[0]
    return f"{text}: {message}" if message else text
