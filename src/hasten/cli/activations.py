"""`hasten calibrate --activations`: static scales for a recipe that quantises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.calibrate import check_run, write_recipe
from hasten.errors import Faults

if TYPE_CHECKING:
    from hasten.recipe import Recipe
    from hasten.settings import CallOptions, Settings


def calibrate_activations(
    asked: CallOptions, recipe: str, prompts: str | None, limit: int, out: Path, *, as_json: bool
) -> None:
    """Look at all of the input, run the plain model over the prompts, write the recipe."""
    chosen, texts, settings = _request(asked, recipe, prompts, limit, out)
    found = _watch(asked, chosen, texts, settings)
    write_recipe(found, out)
    assert found.quantize is not None
    assert found.quantize.amax is not None
    amax = found.quantize.amax
    if as_json:
        result = {"path": str(out), "recipe": found.name, "prompts": len(texts), "amax": dict(amax)}
        print(json.dumps(result, indent=2))
        return
    most = max(amax, key=lambda name: amax[name])
    print(
        f"{out}: static scales of {len(amax)} linears, from {settings.steps} steps of "
        f"{len(texts)} prompts; the largest input is {amax[most]:.4g}, of {most}"
    )


def _request(
    asked: CallOptions, recipe: str, prompts: str | None, limit: int, out: Path
) -> tuple[Recipe, list[str], Settings]:
    """The recipe, the prompts and how they are drawn; raises everything wrong with them at once."""
    from hasten.calibration.static import dynamic
    from hasten.prompts import read_prompts
    from hasten.recipe import Recipe, resolve
    from hasten.settings import Settings, chosen_settings, model_defaults, whole_number

    faults, chosen = Faults(), Recipe()
    with faults.gather():
        chosen = resolve(recipe)
        dynamic(chosen)
    defaults = model_defaults(asked.model, faults)
    otherwise = Settings.of_model(defaults).under(chosen.sampling)
    settings = chosen_settings(asked, otherwise, faults)
    check_run(asked, out, faults)
    count = whole_number("limit", limit, 16, (1, 1000), faults)
    texts: list[str] = []
    with faults.gather():
        texts = read_prompts(prompts or defaults.prompts, limit=count)
    faults.raise_any()
    return chosen, texts, settings


def _watch(asked: CallOptions, recipe: Recipe, texts: list[str], settings: Settings) -> Recipe:
    from hasten.cli.terminal import ProgressBar, silence_library_bars

    with ProgressBar() as progress:
        progress.stage("loading")
        silence_library_bars()
        from hasten import calibrate_activations as watch
        from hasten import load_pipeline

        arguments: dict[str, Any] = settings.call_arguments()
        return watch(
            load_pipeline(asked.model, device=asked.device, dtype=asked.dtype),
            texts,
            recipe=recipe,
            steps=arguments.pop("num_inference_steps"),
            seed=asked.seed,
            progress=progress.show,
            **arguments,
        )
