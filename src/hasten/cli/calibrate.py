"""`hasten calibrate` and `hasten calibrate-scales`: recipes that a model and prompts teach."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.errors import Faults, writing

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


@options.with_call()
def calibrate_command(
    *,
    budget: Budget = None,
    out: Out = Path("schedule.toml"),
    prompts: Prompts = None,
    limit: Limit = 16,
    objective: Objective = "latent",
    climb: Climb = 120,
    resume: Resume = False,
    call: CallOptions,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Learn a schedule: which steps of a model to compute, checked on eight more prompts."""
    from hasten.calibration.inputs import check_budget
    from hasten.settings import whole_number

    faults = Faults()
    texts, settings = _inputs(call, prompts, (limit, HELD_BACK), None, out, faults)
    whole_number("climb", climb, 120, (0, 1_000_000), faults)
    if objective not in OBJECTIVES:
        faults.add(
            f"objective = {objective!r} is not one of {', '.join(OBJECTIVES)}",
            "latent is faster, lpips decodes every trial",
        )
    if budget is None:
        faults.add(
            "--budget is missing: how many steps to compute",
            f"--budget {max(1, settings.steps // 3)} computes a third of the "
            f"{settings.steps} steps",
        )
    else:
        with faults.gather():
            check_budget(budget, settings.steps)
    faults.raise_any()
    wanted = {"budget": budget, "objective": objective, "climb": climb, "held_back": HELD_BACK}
    learned = _learn(call, texts, settings, wanted, out, resume=resume)
    if as_json:
        names = ("error", "interval_error", "lpips", "interval_lpips", "better")
        values = {name: getattr(learned, name) for name in names}
        print(json.dumps({"path": str(out), **values}, indent=2))
        return
    from hasten.cli.terminal import print_text

    verdict = "" if learned.better else "; no better than the interval: use that"
    print_text(
        f"{out}: on {HELD_BACK} held-back prompts, error of the final latents {learned.error:.4f}, "
        f"plain interval {learned.interval_error:.4f}; LPIPS {learned.lpips:.4f}, "
        f"plain interval {learned.interval_lpips:.4f}{verdict}"
    )


@options.with_call()
def calibrate_scales(
    *,
    recipe: Quantising = "fp8",
    out: Out = Path("static.toml"),
    prompts: Prompts = None,
    limit: Limit = 16,
    call: CallOptions,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure static FP8 scales for the inputs of the linears that a recipe quantises."""
    from hasten.calibration.inputs import dynamic
    from hasten.recipe import Recipe, resolve

    faults, chosen = Faults(), Recipe()
    with faults.gather():
        chosen = resolve(recipe)
        dynamic(chosen)
    texts, settings = _inputs(call, prompts, (limit, 0), chosen.sampling, out, faults)
    faults.raise_any()
    calibrated = _measure(call, texts, settings, chosen)
    _write_recipe(calibrated, out)
    assert calibrated.quantize is not None
    amax = dict(calibrated.quantize.amax or {})
    if as_json:
        result = {"path": str(out), "recipe": calibrated.name, "prompts": len(texts), "amax": amax}
        print(json.dumps(result, indent=2))
        return
    from hasten.cli.terminal import print_text

    most = max(amax, key=lambda name: amax[name])
    print_text(
        f"{out}: static scales of {len(amax)} linears, from {settings.steps} steps of "
        f"{len(texts)} prompts; the largest input is {amax[most]:.4g}, of {most}"
    )


def _inputs(
    call: CallOptions,
    source: str | None,
    counts: tuple[int, int],
    sampling: Sampling | None,
    out: Path,
    faults: Faults,
) -> tuple[list[str], Settings]:
    """Prompts, `counts` to learn from and to hold back, and settings; notes all that is wrong."""
    from hasten.calibration.inputs import check_held_back
    from hasten.prompts import read_prompts
    from hasten.settings import whole_number

    settings, defaults = options.checked_settings(call, sampling, faults)
    with faults.gather():
        options.check_out(out, ".toml")
    limit, held_back = counts
    count = whole_number("limit", limit, 16, (1, 1000), faults)
    texts: list[str] = []
    with faults.gather():
        texts = read_prompts(source or f"{defaults.prompts}-calibration", limit=count + held_back)
        if held_back:
            check_held_back(held_back, len(texts))
    return texts, settings


def _learn(
    call: CallOptions,
    texts: list[str],
    settings: Settings,
    wanted: dict[str, Any],
    out: Path,
    *,
    resume: bool,
) -> Calibration:
    """Learn the schedule and write it. Until then, a folder next to it holds the trials."""
    from hasten.calibration.store import remove_store

    state = out.with_name(f"{out.name}.partial")
    try:
        with options.loaded_model(call) as (pipe, progress):
            from hasten import calibrate

            if not resume:
                remove_store(state)
            arguments = wanted | _arguments(call, settings, progress)
            learned = calibrate(pipe, texts, state=state, **arguments)
        _write_recipe(learned.recipe, out)
        remove_store(state)
    except KeyboardInterrupt:
        if state.is_dir():
            print(f"{state} keeps what is done; --resume continues there", file=sys.stderr)
        raise
    return learned


def _measure(call: CallOptions, texts: list[str], settings: Settings, recipe: Recipe) -> Recipe:
    with options.loaded_model(call) as (pipe, progress):
        from hasten import calibrate_activations

        arguments = _arguments(call, settings, progress)
        return calibrate_activations(pipe, texts, recipe=recipe, **arguments)


def _arguments(call: CallOptions, settings: Settings, progress: ProgressBar) -> dict[str, Any]:
    """What both kinds of learning take from the options."""
    arguments = settings.call_arguments()
    steps = arguments.pop("num_inference_steps")
    return {"steps": steps, "seed": call.seed, "progress": progress.show, **arguments}


def _write_recipe(recipe: Recipe, out: Path) -> None:
    from hasten.atomic import write_text

    with writing(out, "choose another --out"):
        write_text(out, recipe.to_toml())
