"""`hasten generate`: one prompt, one PNG."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options
from hasten.errors import Faults, InputError

if TYPE_CHECKING:
    from hasten.generation import Picture, Request
    from hasten.settings import CallOptions


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    *,
    recipe: Annotated[
        str,
        typer.Option(metavar="NAME", help="A preset's name or a .toml file; see `hasten recipes`."),
    ] = "cache",
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where it goes.")] = Path(
        "hasten.png"
    ),
    model: options.Model = "tiny",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    steps: options.Steps = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    max_sequence_length: options.MaxSequenceLength = None,
    force: options.Force = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say what each pass did.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Make one picture; prompt, seed and recipe are stored in the PNG."""
    from hasten.settings import CallOptions
    from hasten.user_files import expand_user

    given = CallOptions(model, device, dtype, steps, size, seed, guidance, max_sequence_length)
    out = expand_user(out)
    request = _request(prompt, recipe, out, given)
    from hasten.generation import save_png

    picture, load_seconds = _render(request, device, dtype, force=force)
    save_png(out, picture.image, request)
    _print_result(picture, request, out, load_seconds, as_json=as_json, verbose=verbose)


def _request(prompt: str, recipe: str, out: Path, given: CallOptions) -> Request:
    """Look at all of the input, and raise everything that is wrong with it at once."""
    from hasten.generation import Request
    from hasten.machine import machine
    from hasten.prompts import check_prompt
    from hasten.recipe import Recipe, resolve
    from hasten.settings import MAX_SEED, Settings, chosen_settings, model_defaults, whole_number

    faults, chosen = Faults(), Recipe()
    with faults.gather():
        check_prompt(prompt)
    with faults.gather():
        chosen = resolve(recipe)
    with faults.gather():
        _check_out(out)
    otherwise = Settings.of_model(model_defaults(given.model, faults)).under(chosen.sampling)
    settings = chosen_settings(given, otherwise, faults)
    seed = whole_number("seed", given.seed, 0, (0, MAX_SEED), faults)
    if given.device not in ("auto", "cpu"):  # these two are always there: no need to look
        with faults.gather():
            machine().usable_device(given.device)
    faults.raise_any()
    return Request(prompt, given.model, chosen, seed, settings)


def _render(request: Request, device: str, dtype: str, *, force: bool) -> tuple[Picture, float]:
    """The picture, and the seconds that loading took."""
    from hasten.cli.terminal import ProgressBar, print_line, silence_library_bars
    from hasten.generation import render
    from hasten.log import forward_log
    from hasten.models.defaults import model_directory

    start = time.perf_counter()
    may_download = model_directory(request.model) is None and ":" not in request.model
    with ProgressBar() as progress, forward_log(print_line, progress.stage):
        if not (may_download and sys.stderr.isatty()):
            progress.stage("loading")
            silence_library_bars()
        from hasten import load_pipeline, optimize

        pipe = load_pipeline(request.model, device=device, dtype=dtype)
        fast = optimize(pipe, request.recipe, force=force)
        load_seconds = time.perf_counter() - start
        what = "compiling, then steps" if request.recipe.compile else "steps"
        progress.stage(what, total=request.settings.steps)
        return render(fast, request, progress.at), load_seconds


def _print_result(
    picture: Picture,
    request: Request,
    out: Path,
    load_seconds: float,
    *,
    as_json: bool,
    verbose: bool,
) -> None:
    from hasten.cli.terminal import print_text

    if as_json:
        result = request.as_json() | {
            "path": str(out),
            "load_seconds": round(load_seconds, 3),
            "image_seconds": round(picture.seconds, 3),
            "steps_computed": picture.steps_computed,
            "summary": picture.summary.splitlines(),
        }
        print(json.dumps(result, indent=2))
        return
    print_text(
        f"{out}: {request.settings.width}x{request.settings.height}, recipe {request.recipe.name}, "
        f"{picture.steps_computed} of {picture.steps} steps computed, "
        f"{picture.seconds:.2f} s (loading {load_seconds:.1f} s)"
    )
    if verbose:
        print_text(picture.summary)


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: not a .png file name", "only PNG is written, for example a.png")
    if os.path.isdir(out):
        raise InputError(f"{out}: a directory, not a file", "give --out a file name")
    options.check_writable(out.parent)
