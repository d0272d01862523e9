"""`hasten calibrate`: learn a schedule, or static scales, for a model and write it as a recipe."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hasten.cli import options
from hasten.errors import Faults, InputError

if TYPE_CHECKING:
    from hasten.calibration.learn import Calibration
    from hasten.recipe import Recipe
    from hasten.settings import CallOptions, Settings

HELD_BACK = 8
OBJECTIVES = ("latent", "lpips")
OF_SCHEDULES = (None, "latent", 120, False)  # defaults of --budget, --objective, --climb, --resume
QUANTISING = "fp8"  # default of --recipe


def calibrate(
    *,
    budget: Annotated[
        int | None, typer.Option(metavar="K", help="How many steps to compute.")
    ] = OF_SCHEDULES[0],
    activations: Annotated[
        bool,
        typer.Option(
            "--activations",
            help="Instead: the scales of what the linears that --recipe quantises are fed.",
        ),
    ] = False,
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="With --activations: a recipe that quantises.")
    ] = QUANTISING,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="The recipe that is written.  [default: schedule.toml or static.toml]",
        ),
    ] = None,
    prompts: options.Prompts = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Prompts to learn from.")] = 16,
    objective: Annotated[
        str, typer.Option(metavar="latent|lpips", help="What to keep near the full run.")
    ] = OF_SCHEDULES[1],
    climb: Annotated[
        int, typer.Option(metavar="N", help="Evaluations a batch spent on improving the plan.")
    ] = OF_SCHEDULES[2],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what an interrupted run left.")
    ] = OF_SCHEDULES[3],
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
    """Learn which steps of a model to compute, checked on eight more prompts; or static scales."""
    from hasten.settings import CallOptions

    asked = CallOptions(model, device, dtype, steps, size, seed, guidance, max_sequence_length)
    if activations:
        from hasten.cli.activations import calibrate_activations

        if (budget, objective, climb, resume) != OF_SCHEDULES:
            raise InputError(
                "--budget, --objective, --climb and --resume are of schedules, and --activations "
                "learns none",
                "leave them out, or --activations",
            )
        calibrate_activations(
            asked, recipe, prompts, limit, out or Path("static.toml"), as_json=as_json
        )
        return
    if recipe != QUANTISING:
        raise InputError(
            "--recipe says what --activations is to look at", "add --activations, or leave it out"
        )
    wanted = Wanted(budget, limit, objective, climb, out or Path("schedule.toml"))
    texts, settings = _request(asked, prompts, wanted)
    found = _learn(asked, texts, settings, wanted, resume=resume)
    write_recipe(found.recipe, wanted.out)
    _forget(wanted.state)
    _print_result(found, wanted.out, as_json=as_json)


@dataclass(frozen=True)
class Wanted:
    """What to learn, and where it goes."""

    budget: int | None
    limit: int
    objective: str
    climb: int
    out: Path

    @property
    def state(self) -> Path:
        """Recordings and trials, until the recipe is written."""
        return self.out.with_name(f"{self.out.name}.partial")


def _request(asked: CallOptions, prompts: str | None, wanted: Wanted) -> tuple[list[str], Settings]:
    """Look at all of the input, and raise everything that is wrong with it at once."""
    from hasten.prompts import read_prompts
    from hasten.settings import Settings, chosen_settings, model_defaults, whole_number

    faults = Faults()
    defaults = model_defaults(asked.model, faults)
    settings = chosen_settings(asked, Settings.of_model(defaults), faults)
    if wanted.budget is None:
        faults.add("--budget is missing: how many steps to compute", "a third of them is usual")
    whole_number("budget", wanted.budget, 1, (1, settings.steps), faults)
    whole_number("climb", wanted.climb, 0, (0, 1_000_000), faults)
    check_run(asked, wanted.out, faults)
    count = whole_number("limit", wanted.limit, 16, (1, 1000), faults)
    texts: list[str] = []
    with faults.gather():
        texts = list(read_prompts(prompts or defaults.prompts, limit=count + HELD_BACK))
        if len(texts) <= HELD_BACK:
            raise InputError(
                f"{len(texts)} prompts are too few: {HELD_BACK} are held back to check the result",
                f"give at least {HELD_BACK + 1}, better {HELD_BACK + 16}",
            )
    with faults.gather():
        if wanted.objective not in OBJECTIVES:
            raise InputError(
                f"objective = {wanted.objective!r} is not one of {', '.join(OBJECTIVES)}",
                "latent is the quicker, lpips decodes every trial",
            )
    faults.raise_any()
    return texts, settings


def check_run(asked: CallOptions, out: Path, faults: Faults) -> None:
    """Seed and device of a calibration, and the place of the recipe that it writes."""
    from hasten.machine import machine
    from hasten.settings import MAX_SEED, whole_number

    whole_number("seed", asked.seed, 0, (0, MAX_SEED), faults)
    if asked.device not in ("auto", "cpu"):  # these two are always there: no need to look
        with faults.gather():
            machine().usable_device(asked.device)
    with faults.gather():
        if out.suffix != ".toml" or out.is_dir():
            raise InputError(f"{out}: not a .toml file name", "for example --out schedule.toml")
        options.check_writable(out.parent)


def _learn(
    asked: CallOptions, texts: list[str], settings: Settings, wanted: Wanted, *, resume: bool
) -> Calibration:
    from hasten.cli.terminal import ProgressBar, silence_library_bars

    assert wanted.budget is not None
    with ProgressBar() as progress:
        progress.stage("loading")
        silence_library_bars()
        from hasten import calibrate as learn
        from hasten import load_pipeline

        if not resume:
            _forget(wanted.state)
        arguments = settings.call_arguments()
        try:
            found = learn(
                load_pipeline(asked.model, device=asked.device, dtype=asked.dtype),
                texts,
                budget=wanted.budget,
                steps=arguments.pop("num_inference_steps"),
                objective=cast(Any, wanted.objective),
                climb=wanted.climb,
                held_back=HELD_BACK,
                seed=asked.seed,
                state=wanted.state,
                progress=progress.show,
                **arguments,
            )
        except KeyboardInterrupt:
            print(f"{wanted.state} keeps what is done; --resume goes on from it", file=sys.stderr)
            raise
        return found


def _forget(state: Path) -> None:
    from hasten.calibration.store import remove_store

    remove_store(state)


def write_recipe(recipe: Recipe, out: Path) -> None:
    """Write it whole or not at all."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(recipe.to_toml(), "utf-8")
        os.replace(draft, out)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written: {error.strerror or error}", "choose another --out"
        ) from None
    finally:
        draft.unlink(missing_ok=True)


def _print_result(found: Calibration, out: Path, *, as_json: bool) -> None:
    if as_json:
        result = {
            "path": str(out),
            "error": found.error,
            "interval_error": found.interval_error,
            "lpips": found.lpips,
            "interval_lpips": found.interval_lpips,
            "better": found.better,
        }
        print(json.dumps(result, indent=2))
        return
    verdict = "" if found.better else "; no better than the interval: use that"
    print(
        f"{out}: on {HELD_BACK} held-back prompts, error of the final latents {found.error:.4f}, "
        f"plain interval {found.interval_error:.4f}; LPIPS {found.lpips:.4f}, "
        f"plain interval {found.interval_lpips:.4f}{verdict}"
    )
