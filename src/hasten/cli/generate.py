"""`hasten generate`: one prompt, one PNG."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options
from hasten.errors import Faults

if TYPE_CHECKING:
    from hasten.generation import Picture, Request
    from hasten.settings import CallOptions


@options.with_call()
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
    call: CallOptions,
    force: options.Force = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say what each pass did.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Make one picture; prompt, seed and recipe are stored in the PNG."""
    from hasten.cli.terminal import print_text
    from hasten.generation import save_png
    from hasten.passes.cache.plan import why_none_skipped
    from hasten.user_files import expand_user

    out = expand_user(out)
    request = _request(prompt, recipe, out, call)
    picture, load_seconds = _draw(request, call, force=force)
    save_png(out, picture.image, request)
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
    elif unskipped := why_none_skipped(request.recipe.cache, request.settings.steps):
        print_text(unskipped)


def _request(prompt: str, recipe: str, out: Path, call: CallOptions) -> Request:
    """Look at all of the input, and raise everything that is wrong with it at once."""
    from hasten.generation import Request
    from hasten.prompts import check_prompt
    from hasten.recipe import Recipe, resolve

    faults, chosen = Faults(), Recipe()
    with faults.gather():
        check_prompt(prompt)
    with faults.gather():
        chosen = resolve(recipe)
    with faults.gather():
        options.check_out(out, ".png")
    settings, _ = options.checked_settings(call, chosen.sampling, faults)
    faults.raise_any()
    return Request(prompt, call.model, chosen, call.seed, settings)


def _draw(request: Request, call: CallOptions, *, force: bool) -> tuple[Picture, float]:
    """The picture, and the seconds that loading took."""
    from hasten.generation import render

    start = time.perf_counter()
    with options.loaded_model(call) as (pipe, progress):
        from hasten import optimize

        fast = optimize(pipe, request.recipe, force=force)
        load_seconds = time.perf_counter() - start
        stage = "compiling, then steps" if request.recipe.compile else "steps"
        progress.stage(stage, total=request.settings.steps)
        return render(fast, request, progress.at), load_seconds
