"""`hasten generate`: one prompt, one PNG."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten import __version__
from hasten.cli import options
from hasten.errors import Faults, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from hasten.cli.progress import ProgressBar
    from hasten.recipe import Recipe
    from hasten.settings import CallOptions, Settings


@dataclass(frozen=True)
class Request:
    """Everything that decides the picture, resolved: options, then the recipe, then the model."""

    prompt: str
    model: str
    recipe: Recipe
    seed: int
    settings: Settings


@dataclass(frozen=True)
class Picture:
    """A rendered image, the time it took (seconds) and what the recipe did."""

    image: Image
    load_seconds: float
    image_seconds: float
    steps: int
    steps_computed: int
    summary: str


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

    asked = CallOptions(model, device, dtype, steps, size, seed, guidance, max_sequence_length)
    request = _request(prompt, recipe, out, asked)
    picture = _render(request, device, dtype, force=force)
    _save(picture.image, request, out)
    _print_result(picture, request, out, as_json=as_json, verbose=verbose)


def _request(prompt: str, recipe: str, out: Path, asked: CallOptions) -> Request:
    """Look at all of the input, and raise everything that is wrong with it at once."""
    from hasten.machine import machine
    from hasten.recipe import Recipe, resolve
    from hasten.settings import MAX_SEED, Settings, chosen_settings, model_defaults, whole_number

    faults, chosen = Faults(), Recipe()
    with faults.gather():
        _check_prompt(prompt)
    with faults.gather():
        chosen = resolve(recipe)
    with faults.gather():
        _check_out(out)
    otherwise = Settings.of_model(model_defaults(asked.model, faults)).under(chosen.sampling)
    settings = chosen_settings(asked, otherwise, faults)
    seed = whole_number("seed", asked.seed, 0, (0, MAX_SEED), faults)
    if asked.device not in ("auto", "cpu"):  # these two are always there: no need to look
        with faults.gather():
            machine().usable_device(asked.device)
    faults.raise_any()
    return Request(prompt, asked.model, chosen, seed, settings)


def _render(request: Request, device: str, dtype: str, *, force: bool) -> Picture:
    from hasten.cli.progress import ProgressBar, print_line, silence_library_bars
    from hasten.log import forward_log
    from hasten.models.defaults import model_directory

    start = time.perf_counter()
    may_download = model_directory(request.model) is None and ":" not in request.model
    with ProgressBar() as progress, forward_log(print_line, progress.stage):
        if not (may_download and sys.stderr.isatty()):
            progress.stage("loading")
            silence_library_bars()
        import torch

        from hasten import load_pipeline, optimize

        pipe = load_pipeline(request.model, device=device, dtype=dtype)
        fast = optimize(pipe, request.recipe, force=force)
        loaded = time.perf_counter()
        what = "compiling, then steps" if request.recipe.compile else "steps"
        progress.stage(what, total=request.settings.steps)
        image = fast(
            request.prompt,
            **request.settings.call_arguments(),
            # On the CPU, so that a seed gives the same noise on every device.
            generator=torch.Generator().manual_seed(request.seed),
            callback_on_step_end=_reporting(progress),
        ).images[0]
        done = time.perf_counter()
    run = fast.last_run
    return Picture(image, loaded - start, done - loaded, run.steps, run.computed, fast.summary())


def _reporting(progress: ProgressBar) -> Any:
    """A Diffusers step callback that moves the bar and changes nothing."""

    def at_step_end(_pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        progress.at(step + 1)
        return {}

    return at_step_end


def _save(image: Image, request: Request, out: Path) -> None:
    """Write the PNG in one step, with what is needed to make it again as text chunks."""
    from PIL.PngImagePlugin import PngInfo

    from hasten.machine import version_of

    info = PngInfo()
    versions = {name: version_of(name) for name in ("torch", "diffusers", "transformers")}
    texts = {
        "prompt": request.prompt,
        "hasten": json.dumps(_facts(request) | {"versions": {"hasten": __version__, **versions}}),
        "recipe": request.recipe.to_toml(),
    }
    for name, text in texts.items():
        info.add_itxt(name, text)
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        image.save(draft, format="PNG", pnginfo=info)
        os.replace(draft, out)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written: {error.strerror or error}", "choose another --out"
        ) from None
    finally:
        draft.unlink(missing_ok=True)


def _facts(request: Request) -> dict[str, Any]:
    """The request as JSON values; the recipe by its name."""
    return {
        "prompt": request.prompt,
        "model": request.model,
        "recipe": request.recipe.name,
        "seed": request.seed,
        **vars(request.settings),
    }


def _print_result(
    picture: Picture, request: Request, out: Path, *, as_json: bool, verbose: bool
) -> None:
    if as_json:
        result = _facts(request) | {
            "path": str(out),
            "load_seconds": round(picture.load_seconds, 3),
            "image_seconds": round(picture.image_seconds, 3),
            "steps_computed": picture.steps_computed,
            "summary": picture.summary.splitlines(),
        }
        print(json.dumps(result, indent=2))
        return
    print(
        f"{out}: {request.settings.width}x{request.settings.height}, recipe {request.recipe.name}, "
        f"{picture.steps_computed} of {picture.steps} steps computed, "
        f"{picture.image_seconds:.2f} s (loading {picture.load_seconds:.1f} s)"
    )
    if verbose:
        print(picture.summary)


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise InputError("the prompt is empty", 'say what to draw: hasten generate "a red kite"')
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8 text", "set the terminal to UTF-8") from None


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: not a .png file name", "only PNG is written, for example a.png")
    if out.is_dir():
        raise InputError(f"{out}: a directory, not a file", "give --out a file name")
    options.check_writable(out.parent)
