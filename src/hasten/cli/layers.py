"""`hasten layers`: the error of each linear that a recipe quantises, the worst first."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.errors import Faults, InputError, UnsupportedError

if TYPE_CHECKING:
    from hasten.quantization.report import LayerError
    from hasten.recipe import Quantize, Recipe
    from hasten.settings import CallOptions, Settings

STEPS = 4  # of the one run that is measured: from pure noise to almost none
SHOWN = 20
TOGETHER = (
    "with [fuse], skip a whole block, or all linears with the same input (in FLUX's attention: "
    "to_q, to_k, to_v and add_*_proj or proj_mlp): else all blocks leave the kernels"
)


@dataclass(frozen=True)
class Measured:
    """Errors, worst first, and what they were measured on."""

    model: str
    recipe: Recipe
    quantize: Quantize
    device: str
    dtype: str
    prompt: str
    errors: list[LayerError]
    skip: list[str]


@options.with_call("model", "device", "dtype")
def layers(
    *,
    recipe: Annotated[str, typer.Option(metavar="NAME", help="A recipe that quantises.")] = "fp8",
    call: CallOptions,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure the quantisation error of each layer of a model, on four steps of one prompt."""
    from hasten.prompts import read_prompts
    from hasten.recipe import Recipe, resolve

    faults, chosen = Faults(), Recipe()
    with faults.gather():
        chosen = resolve(recipe)
        if chosen.quantize is None:
            faults.add(f"the recipe {recipe} quantises nothing", "give one with [quantize]: fp8")
    settings, defaults = options.checked_settings(call, chosen.sampling, faults)
    quantize = chosen.quantize
    if quantize is not None:
        with faults.gather():
            _check_device(quantize, call.device)
    faults.raise_any()
    assert quantize is not None
    prompt = read_prompts(defaults.prompts)[0]
    measured = _measure(call, chosen, quantize, prompt, replace(settings, steps=STEPS))
    print(json.dumps(_as_data(measured), indent=2)) if as_json else _print(measured)


def _check_device(quantize: Quantize, device: str) -> None:
    from hasten.machine import machine

    here = machine()
    target = here.usable_device(device)
    problem = here.quantize_problem(target, quantize.scheme, emulate=quantize.emulate)
    if problem is not None:
        raise UnsupportedError(*problem)


def _measure(
    call: CallOptions, recipe: Recipe, quantize: Quantize, prompt: str, settings: Settings
) -> Measured:
    with options.loaded_model(call) as (pipe, progress):
        import torch

        from hasten.families import family_of
        from hasten.generation import step_callback
        from hasten.quantization.plan import plan_linears
        from hasten.quantization.report import layer_errors, worth_skipping

        linears = family_of(pipe).quantizable(pipe.transformer)
        names = set(plan_linears(pipe.transformer, linears, quantize).names)
        progress.stage("steps", total=STEPS)

        def run() -> None:
            pipe(
                prompt=prompt,
                **settings.call_arguments(),
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                callback_on_step_end=step_callback(progress.at),
            )

        errors = layer_errors([item for item in linears if item[0] in names], quantize, run)
    if not errors:
        raise InputError(
            f"none of the linears of {call.model} ran", "give a model whose blocks run"
        )
    where = str(pipe.device), str(pipe.transformer.dtype).removeprefix("torch.")
    skip = worth_skipping(errors)
    return Measured(call.model, recipe, quantize, *where, prompt, errors, skip)


def _as_data(measured: Measured) -> dict[str, Any]:
    """The same as JSON values; a ratio that is not finite is null."""
    layers = [
        asdict(error) | {"sqnr_db": error.sqnr_db if math.isfinite(error.sqnr_db) else None}
        for error in measured.errors
    ]
    return {
        "model": measured.model,
        "recipe": measured.recipe.name,
        "device": measured.device,
        "dtype": measured.dtype,
        "quantize": measured.quantize.model_dump(),
        "steps": STEPS,
        "prompt": measured.prompt,
        "layers": layers,
        "skip": measured.skip,
    }


def _print(measured: Measured) -> None:
    from hasten.cli.terminal import print_table, print_text

    scheme, errors = measured.quantize, measured.errors
    emulated = ", emulated" if scheme.emulate else ""
    print_text(
        f"{len(errors)} linears of {measured.model} in {scheme.scheme}, one scale per "
        f"{scheme.granularity}{emulated}, against "
        f"{measured.dtype} on {measured.device}: {STEPS} steps of one image"
    )
    print()
    rows = [
        (error.name, str(error.inputs), str(error.outputs), f"{error.sqnr_db:.1f}",
         f"{100 * 10 ** (-error.sqnr_db / 20):.2f} %")
        for error in errors[:SHOWN]
    ]  # fmt: skip
    print_table(("linear", "inputs", "outputs", "SQNR dB", "error"), rows, right="lrrrr")
    if len(errors) > SHOWN:
        print_text(f"and {len(errors) - SHOWN} with less error (--json lists all)")
    middle = median(error.sqnr_db for error in errors)
    print()
    print_text(
        f"worst {errors[0].sqnr_db:.1f} dB, median {middle:.1f} dB, "
        f"best {errors[-1].sqnr_db:.1f} dB"
    )
    if not measured.skip:
        print_text("none has twice the median's error: no reason to skip any")
        return
    print_text("these have twice the median's error or more; to keep them unquantised:")
    print(f"  [quantize]\n  skip = {json.dumps([*scheme.skip, *measured.skip])}")
    fuse = measured.recipe.fuse
    if fuse is not None and fuse.kernels != "off":
        print_text(TOGETHER)
