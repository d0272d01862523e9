"""`hasten.calibrate_activations`: measures static activation scales on a pipeline and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.calibration.inputs import dynamic
from hasten.calibration.learn import sampling_request
from hasten.errors import InputError, ModelError
from hasten.families import family_of
from hasten.kernels.quantize import TINY
from hasten.models.fingerprint import fingerprint
from hasten.quantization.plan import Linears, plan_linears
from hasten.quantization.report import watched
from hasten.recipe import Quantize, Recipe, resolve

LONGEST_NAME = 64  # of a recipe


@torch.no_grad()
def calibrate_activations(
    pipe: Any,
    prompts: Sequence[str],
    *,
    recipe: str | Recipe = "fp8",
    steps: int = 50,
    batch: int = 1,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **arguments: Any,
) -> Recipe:
    """Measure static scales for the inputs of the linears that a recipe quantises.

    Samples the prompts with the plain pipeline, which is not modified, and records the largest
    absolute input of each linear over all steps. Deterministic for a given seed.

    Args:
        pipe: A plain pipeline.
        prompts: Prompts to sample; 16 are enough.
        recipe: A recipe with `[quantize] scheme = "fp8"`. Its static scales, if any, are replaced.
        steps: Number of inference steps.
        batch: Number of prompts per pipeline call.
        seed: Seed of the first prompt's noise; prompt i uses `seed + i`.
        progress: Called with the stage, the number of finished prompts and the total.
        **arguments: Further arguments of the pipeline call.

    Returns:
        The recipe with static scales.

    Raises:
        InputError: There are no prompts, the recipe cannot have static scales, or a linear was
            never called.
        UnsupportedError: The pipeline cannot be quantised as the recipe requires. Nothing has run.
        ModelError: An input is not finite.
    """
    report = progress or (lambda *_: None)
    if not prompts:
        raise InputError("there are no prompts to calibrate on", "give prompts; 16 are enough")
    recipe = resolve(recipe)
    quantize = dynamic(recipe)
    request = sampling_request(pipe, prompts, steps, seed, batch, arguments)
    transformer = request.pipe.transformer
    linears = family_of(request.pipe).quantizable(transformer)
    names = set(plan_linears(transformer, linears, quantize).names)

    def run() -> None:
        for ids in request.batches(range(len(prompts))):
            report("record activations", ids.start, len(prompts))
            request.run(request.pipe, ids)
        report("record activations", len(prompts), len(prompts))

    amax = largest_inputs([item for item in linears if item[0] in names], run)
    scales = {"activations": "static", "amax": amax, "fingerprint": fingerprint(transformer)}
    return _with_scales(recipe, Quantize(**{**dict(quantize), **scales}))


def _with_scales(recipe: Recipe, quantize: Quantize) -> Recipe:
    name = recipe.name.removesuffix("-static")[: LONGEST_NAME - len("-static")]
    return recipe.but(
        name=f"{name}-static",
        description=f"{name} with static scales for the inputs of its linears",
        quantize=quantize,
    )


def largest_inputs(linears: Linears, run: Callable[[], object]) -> dict[str, float]:
    """The largest absolute input of each linear during `run()`, at least 1e-12.

    The linears are left unmodified. Synchronises with the device once.

    Raises:
        InputError: A linear was never called.
        ModelError: An input was not finite.
    """
    seen: dict[str, Tensor] = {}
    with watched(linears, lambda name: partial(_keep_largest, seen, name)):
        run()
    idle = [name for name, _ in linears if name not in seen]
    if idle:
        raise InputError(
            f"{len(idle)} linears were never called, the first is {idle[0]}",
            "add them to quantize.skip, or calibrate with calls that use them",
        )
    amax = dict(
        zip(seen, torch.stack([value.cpu() for value in seen.values()]).tolist(), strict=True)
    )
    invalid = [name for name, value in amax.items() if not value < float("inf")]
    if invalid:
        raise ModelError(
            f"the inputs of {len(invalid)} linears are not finite, the first is {invalid[0]}",
            "load the model in bfloat16 or float32",
        )
    return {name: max(amax[name], TINY) for name, _ in linears}


def _keep_largest(
    seen: dict[str, Tensor],
    name: str,
    _linear: nn.Module,
    args: tuple[Tensor, ...],
    _output: Tensor,
) -> None:
    """A forward hook that updates `seen`; `torch.maximum` propagates NaN."""
    largest = args[0].detach().abs().amax().float()
    seen[name] = torch.maximum(seen[name], largest) if name in seen else largest
