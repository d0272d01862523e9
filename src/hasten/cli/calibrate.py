"""`hasten calibrate` and `hasten calibrate-scales`: recipes that a model and prompts teach."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hasten.cli import options
from hasten.errors import Faults, InputError

if TYPE_CHECKING:
    from hasten.calibration.learn import Calibration
    from hasten.cli.terminal import ProgressBar
    from hasten.recipe import Recipe, Sampling
    from hasten.settings import CallOptions, Settings

HELD_BACK = 8
OBJECTIVES = ("latent", "lpips")

Budget = Annotated[int | None, typer.Option(metavar="K", help="How many steps to compute.")]
Quantising = Annotated[str, typer.Option(metavar="NAME", help="A recipe that quantises.")]
Out = Annotated[Path, typer.Option(metavar="FILE.toml", help="The recipe to write.")]
Limit = Annotated[int, typer.Option(metavar="N", help="Prompts to learn from.")]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="A file of prompts or a bundled set; keep those of benchmarks out.  "
        "[default: a set for the model that bench does not use]",
    ),
]
Objective = Annotated[
    str, typer.Option(metavar="latent|lpips", help="What to keep close to the full run.")
]
Climb = Annotated[
    int, typer.Option(metavar="N", help="Transformer evaluations spent on refining the schedule.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from what an interrupted run left.")
]


@dataclass(frozen=True)
class Wanted:
    """What schedule to learn, and where it goes."""

    budget: int | None
    objective: str
    climb: int
    out: Path

    @property
    def state(self) -> Path:
        """Recordings and trials, until the recipe is written."""
        return self.out.with_name(f"{self.out.name}.partial")


def calibrate(
    *,
    budget: Budget = None,
    out: Out = Path("schedule.toml"),
    prompts: Prompts = None,
    limit: Limit = 16,
    objective: Objective = "latent",
    climb: Climb = 120,
    resume: Resume = False,
    model: options.Model = "tiny",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    steps: options.Steps = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    max_sequence_length: options.MaxSequenceLength = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Learn a schedule: which steps of a model to compute, checked on eight more prompts."""
    from hasten.settings import CallOptions

    call = CallOptions(model, device, dtype, steps, size, seed, guidance, max_sequence_length)
    wanted = Wanted(budget, objective, climb, out)
    faults = Faults()
    texts, settings = _inputs(call, prompts, (limit, HELD_BACK), None, out, faults)
    _check_wanted(wanted, settings.steps, faults)
    faults.raise_any()
    try:
        found = _learn(call, texts, settings, wanted, resume=resume)
        _write_recipe(found.recipe, out)
        _forget(wanted.state)
    except KeyboardInterrupt:
        if wanted.state.is_dir():
            print(f"{wanted.state} keeps what is done; --resume continues there", file=sys.stderr)
        raise
    _print_schedule(found, out, as_json=as_json)


def calibrate_scales(
    *,
    recipe: Quantising = "fp8",
    out: Out = Path("static.toml"),
    prompts: Prompts = None,
    limit: Limit = 16,
    model: options.Model = "tiny",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    steps: options.Steps = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    max_sequence_length: options.MaxSequenceLength = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure static FP8 scales for the inputs of the linears that a recipe quantises."""
    from hasten.calibration.static import dynamic
    from hasten.recipe import Recipe, resolve
    from hasten.settings import CallOptions

    call = CallOptions(model, device, dtype, steps, size, seed, guidance, max_sequence_length)
    faults, chosen = Faults(), Recipe()
    with faults.gather():
        chosen = resolve(recipe)
        dynamic(chosen)
    texts, settings = _inputs(call, prompts, (limit, 0), chosen.sampling, out, faults)
    faults.raise_any()
    found = _measure(call, texts, settings, chosen)
    _write_recipe(found, out)
    _print_scales(found, out, len(texts), settings.steps, as_json=as_json)


def _inputs(
    call: CallOptions,
    source: str | None,
    counts: tuple[int, int],
    sampling: Sampling | None,
    out: Path,
    faults: Faults,
) -> tuple[list[str], Settings]:
    """Prompts, `counts` to learn from and to hold back, and settings; notes all that is wrong."""
    from hasten.machine import machine
    from hasten.prompts import read_prompts
    from hasten.settings import (
        MAX_SEED,
        Settings,
        chosen_settings,
        model_defaults,
        whole_number,
    )

    defaults = model_defaults(call.model, faults)
    settings = chosen_settings(call, Settings.of_model(defaults).under(sampling), faults)
    whole_number("seed", call.seed, 0, (0, MAX_SEED), faults)
    if call.device not in ("auto", "cpu"):  # these two are always there: no need to look
        with faults.gather():
            machine().usable_device(call.device)
    with faults.gather():
        if out.suffix != ".toml" or out.is_dir():
            raise InputError(f"{out}: not a .toml file name", f"for example --out {out.stem}.toml")
        options.check_writable(out.parent)
    limit, held_back = counts
    count = whole_number("limit", limit, 16, (1, 1000), faults)
    texts: list[str] = []
    with faults.gather():
        texts = read_prompts(source or f"{defaults.prompts}-calibration", limit=count + held_back)
        if len(texts) <= held_back:
            raise InputError(
                f"{len(texts)} prompts are too few: {held_back} are held back to check the result",
                f"give at least {held_back + 1}, better {held_back + 16}",
            )
    return texts, settings


def _check_wanted(wanted: Wanted, steps: int, faults: Faults) -> None:
    from hasten.settings import whole_number

    if wanted.budget is None:
        faults.add(
            "--budget is missing: how many steps to compute",
            f"--budget {max(1, steps // 3)} computes a third of the {steps} steps",
        )
    elif not 1 <= wanted.budget <= steps:
        faults.add(
            f"budget = {wanted.budget} is not a whole number from 1 to {steps}, the steps of a run",
            f"--budget {max(1, steps // 3)} computes a third of them",
        )
    whole_number("climb", wanted.climb, 120, (0, 1_000_000), faults)
    if wanted.objective not in OBJECTIVES:
        faults.add(
            f"objective = {wanted.objective!r} is not one of {', '.join(OBJECTIVES)}",
            "latent is faster, lpips decodes every trial",
        )


def _learn(
    call: CallOptions, texts: list[str], settings: Settings, wanted: Wanted, *, resume: bool
) -> Calibration:
    from hasten.cli.terminal import ProgressBar

    assert wanted.budget is not None
    with ProgressBar() as progress:
        pipe = _load(call, progress)
        from hasten import calibrate as learn

        if not resume:
            _forget(wanted.state)
        return learn(
            pipe,
            texts,
            budget=wanted.budget,
            objective=cast(Any, wanted.objective),
            climb=wanted.climb,
            held_back=HELD_BACK,
            state=wanted.state,
            **_arguments(call, settings, progress),
        )


def _measure(call: CallOptions, texts: list[str], settings: Settings, recipe: Recipe) -> Recipe:
    from hasten.cli.terminal import ProgressBar

    with ProgressBar() as progress:
        pipe = _load(call, progress)
        from hasten import calibrate_activations

        arguments = _arguments(call, settings, progress)
        return calibrate_activations(pipe, texts, recipe=recipe, **arguments)


def _load(call: CallOptions, progress: ProgressBar) -> Any:
    from hasten.cli.terminal import silence_library_bars

    progress.stage("loading")
    silence_library_bars()
    from hasten import load_pipeline

    return load_pipeline(call.model, device=call.device, dtype=call.dtype)


def _arguments(call: CallOptions, settings: Settings, progress: ProgressBar) -> dict[str, Any]:
    """What both kinds of learning take from the options."""
    arguments = settings.call_arguments()
    steps = arguments.pop("num_inference_steps")
    return {"steps": steps, "seed": call.seed, "progress": progress.show, **arguments}


def _forget(state: Path) -> None:
    from hasten.calibration.store import remove_store

    remove_store(state)


def _write_recipe(recipe: Recipe, out: Path) -> None:
    from hasten.atomic import write_text

    try:
        write_text(out, recipe.to_toml())
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written: {error.strerror or error}", "choose another --out"
        ) from None


def _print_schedule(found: Calibration, out: Path, *, as_json: bool) -> None:
    if as_json:
        names = ("error", "interval_error", "lpips", "interval_lpips", "better")
        values = {name: getattr(found, name) for name in names}
        print(json.dumps({"path": str(out), **values}, indent=2))
        return
    verdict = "" if found.better else "; no better than the interval: use that"
    print(
        f"{out}: on {HELD_BACK} held-back prompts, error of the final latents {found.error:.4f}, "
        f"plain interval {found.interval_error:.4f}; LPIPS {found.lpips:.4f}, "
        f"plain interval {found.interval_lpips:.4f}{verdict}"
    )


def _print_scales(recipe: Recipe, out: Path, prompts: int, steps: int, *, as_json: bool) -> None:
    assert recipe.quantize is not None
    amax = dict(recipe.quantize.amax or {})
    if as_json:
        result = {"path": str(out), "recipe": recipe.name, "prompts": prompts, "amax": amax}
        print(json.dumps(result, indent=2))
        return
    most = max(amax, key=lambda name: amax[name])
    print(
        f"{out}: static scales of {len(amax)} linears, from {steps} steps of "
        f"{prompts} prompts; the largest input is {amax[most]:.4g}, of {most}"
    )
