"""What commands share: the options of a pipeline's call, their check, and loading a model."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from hasten.errors import Faults, InputError, writing

if TYPE_CHECKING:
    from hasten.cli.terminal import ProgressBar
    from hasten.models.defaults import ModelDefaults
    from hasten.recipe import Sampling
    from hasten.settings import CallOptions, Settings

Command = Callable[..., None]

Force = Annotated[
    bool, typer.Option("--force", help="Use a schedule or scales learned on another model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Prompts as .txt (one per line), .csv, .tsv or .jsonl; or tiny or general.  "
        "[default: the model's]",
    ),
]


def _call_option(kind: Any, default: object, metavar: str, help: str) -> tuple[Any, object]:
    return Annotated[kind, typer.Option(metavar=metavar, help=help)], default


# The fields of hasten.settings.CallOptions: annotation and default of each option. No bounds here:
# typer would stop at the first value out of them. hasten.settings finds them all.
CALL = {
    "model": _call_option(
        str,
        "tiny",
        "NAME",
        "tiny (bundled), a local directory, a hub id, or shape:flux.1-dev (random weights).",
    ),
    "device": _call_option(str, "auto", "NAME", "auto, cpu, cuda, cuda:N or mps."),
    "dtype": _call_option(str, "auto", "NAME", "auto, float32, bfloat16 or float16."),
    "steps": _call_option(
        int | None, None, "N", "Denoising steps, 1 to 1000.  [default: the model's]"
    ),
    "size": _call_option(
        str | None, None, "WxH", "Pixels, multiples of 16.  [default: the model's]"
    ),
    "seed": _call_option(int, 0, "N", "Seed of the noise, 0 or more."),
    "guidance": _call_option(
        float | None, None, "X", "Distilled guidance scale, 0 to 100.  [default: the model's]"
    ),
    "max_sequence_length": _call_option(
        int | None, None, "N", "Text tokens for T5, 1 to 512.  [default: the model's]"
    ),
}


def with_call(*names: str) -> Callable[[Command], Command]:
    """Give a command the options of a pipeline's call: these, or all of them.

    They take the place of the command's parameter `call: CallOptions`, which gets their values.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, localns={"CallOptions": Any}, include_extras=True)
        parameters: list[Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name != "call":
                parameters.append(parameter.replace(annotation=hints[parameter.name]))
                continue
            for name in names or CALL:
                hint, default = CALL[name]
                kind = Parameter.KEYWORD_ONLY
                parameters.append(Parameter(name, kind, default=default, annotation=hint))

        @wraps(command)
        def run(**given: Any) -> None:
            from hasten.settings import CallOptions

            call = CallOptions(**{name: given.pop(name) for name in names or CALL})
            command(call=call, **given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def checked_settings(
    call: CallOptions, sampling: Sampling | None, faults: Faults
) -> tuple[Settings, ModelDefaults]:
    """The settings of a call under a recipe's `[sampling]`, and the model's defaults.

    What is wrong with the call goes into `faults`.
    """
    from hasten.machine import machine
    from hasten.settings import MAX_SEED, Settings, chosen_settings, model_defaults, whole_number

    defaults = model_defaults(call.model, faults)
    settings = chosen_settings(call, Settings.of_model(defaults).under(sampling), faults)
    whole_number("seed", call.seed, 0, (0, MAX_SEED), faults)
    if call.device not in ("auto", "cpu"):  # these two are always there: no need to look
        with faults.gather():
            machine().usable_device(call.device)
    return settings, defaults


def check_out(out: Path, suffix: str) -> None:
    """Refuse a file of another kind, and a folder that is missing or cannot be written to."""
    if out.suffix.lower() != suffix:
        raise InputError(f"{out}: not a {suffix} file name", f"for example --out a{suffix}")
    if os.path.isdir(out):
        raise InputError(f"{out}: a directory, not a file", "give --out a file name")
    folder = out.parent
    if not os.path.lexists(folder):
        raise InputError(f"{folder}: no such directory", f"mkdir -p -- {shlex.quote(str(folder))}")
    with (
        writing(folder, "give --out a place that can be written"),
        tempfile.NamedTemporaryFile(dir=folder, prefix=".hasten-", suffix=".tmp"),
    ):
        pass


@contextmanager
def loaded_model(call: CallOptions) -> Iterator[tuple[Any, ProgressBar]]:
    """The pipeline that the options name, and the progress bar that has shown its loading.

    What is logged meanwhile is printed.
    Where a model may have to be downloaded, a terminal shows the libraries' own bars instead.
    """
    from hasten.cli.terminal import ProgressBar, print_line, silence_library_bars
    from hasten.log import forward_log
    from hasten.models.defaults import model_directory

    may_download = model_directory(call.model) is None and ":" not in call.model
    with ProgressBar() as progress, forward_log(print_line, progress.stage):
        if not (may_download and sys.stderr.isatty()):
            progress.stage("loading")
            silence_library_bars()
        from hasten.models import load_pipeline

        pipe = load_pipeline(call.model, device=call.device, dtype=call.dtype)
        pipe.set_progress_bar_config(disable=True)  # ours shows the steps
        yield pipe, progress
