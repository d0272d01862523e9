"""`hasten calibrate`: learn a schedule for a model and write it as a recipe."""

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
    from hasten.settings import CallOptions, Settings

HELD_BACK = 8
OBJECTIVES = ("latent", "lpips")


def calibrate(
    *,
    budget: Annotated[
        int, typer.Option(metavar="K", help="How many steps to compute.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.toml", help="The recipe that is written.")] = (
        Path("schedule.toml")
    ),
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt a line.  [default: the model's set]"),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Prompts to learn from.")] = 16,
    objective: Annotated[
        str, typer.Option(metavar="latent|lpips", help="What to keep near the full run.")
    ] = "latent",
    climb: Annotated[
        int, typer.Option(metavar="N", help="Evaluations a batch spent on improving the plan.")
    ] = 120,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what an interrupted run left.")
    ] = False,
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
    """Learn which steps of a model to compute; eight more prompts check the result."""
    from hasten.settings import CallOptions

    asked = CallOptions(model, device, dtype, steps, size, seed, guidance, max_sequence_length)
    wanted = Wanted(budget, limit, objective, climb, out)
    texts, settings = _request(asked, prompts, wanted)
    found = _learn(asked, texts, settings, wanted, resume=resume)
    _write(found, out)
    _forget(wanted.state)
    _print_result(found, out, as_json=as_json)


@dataclass(frozen=True)
class Wanted:
    """What to learn, and where it goes."""

    budget: int
    limit: int
    objective: str
    climb: int
    out: Path

    @property
    def state(self) -> Path:
        """Recordings and trials, until the recipe is written."""
        return self.out.with_name(f"{self.out.name}.partial")


def _request(
    asked: CallOptions, prompts: Path | None, wanted: Wanted
) -> tuple[list[str], Settings]:
    """Look at all of the input, and raise everything that is wrong with it at once."""
    from hasten.machine import machine
    from hasten.prompts import read_prompts
    from hasten.settings import MAX_SEED, Settings, chosen_settings, model_defaults, whole_number

    faults = Faults()
    defaults = model_defaults(asked.model, faults)
    settings = chosen_settings(asked, Settings.of_model(defaults), faults)
    whole_number("budget", wanted.budget, 1, (1, settings.steps), faults)
    whole_number("climb", wanted.climb, 0, (0, 1_000_000), faults)
    whole_number("seed", asked.seed, 0, (0, MAX_SEED), faults)
    if asked.device not in ("auto", "cpu"):  # these two are always there: no need to look
        with faults.gather():
            machine().usable_device(asked.device)
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
    with faults.gather():
        if wanted.out.suffix != ".toml" or wanted.out.is_dir():
            raise InputError(
                f"{wanted.out}: not a .toml file name", "for example --out schedule.toml"
            )
        options.check_writable(wanted.out.parent)
    faults.raise_any()
    return texts, settings


def _learn(
    asked: CallOptions, texts: list[str], settings: Settings, wanted: Wanted, *, resume: bool
) -> Calibration:
    from hasten.cli.progress import ProgressBar, silence_library_bars

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


def _write(found: Calibration, out: Path) -> None:
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(found.recipe.to_toml(), "utf-8")
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
