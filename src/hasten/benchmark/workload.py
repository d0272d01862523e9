"""From options to the frozen workload that every row renders. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hasten.errors import Faults
from hasten.models.defaults import ModelDefaults
from hasten.prompts import read_prompts
from hasten.recipe import Recipe
from hasten.results import Prompt, Workload
from hasten.settings import (
    MAX_SEED,
    CallOptions,
    Settings,
    chosen_settings,
    model_defaults,
    whole_number,
)

__all__ = ["Options", "resolve_workload", "settings_of"]

DEFAULT_LIMIT = 50


@dataclass(frozen=True)
class Options(CallOptions):
    """What was asked for; without a file, `last` and `limit`, the first 50 of the model's set.

    `force` uses schedules learned on another model.
    """

    prompts: str | Path | None = None
    last: int | None = None
    limit: int | None = None
    rounds: int = 1
    force: bool = False


def resolve_workload(options: Options, faults: Faults) -> Workload:
    """The workload of `options`, `dtype` still as asked; what is wrong goes into `faults`.

    Prompt i is drawn with seed `options.seed + i`. After a fault the value is a stand-in, so that
    everything that follows can still be looked at.
    """
    defaults = model_defaults(options.model, faults)
    settings = chosen_settings(options, Settings.of_model(defaults), faults)
    prompts = _prompts(options, defaults, faults)
    seed = whole_number("seed", options.seed, 0, (0, MAX_SEED - len(prompts)), faults)
    return Workload(
        model=options.model,
        width=settings.width,
        height=settings.height,
        steps=settings.steps,
        guidance=settings.guidance,
        seed=seed,
        dtype=options.dtype,
        prompt_source=_prompt_source(options, defaults),
        prompts=tuple(
            Prompt(id=index, text=text, seed=seed + index) for index, text in enumerate(prompts)
        ),
        max_sequence_length=settings.max_sequence_length,
        rounds=whole_number("rounds", options.rounds, 1, (1, 100), faults),
    )


def settings_of(recipe: Recipe, workload: Workload) -> Settings:
    """The workload's settings, overridden by what the recipe's `[sampling]` sets."""
    tokens = workload.max_sequence_length or ModelDefaults().max_sequence_length
    every_row = Settings(workload.width, workload.height, workload.steps, workload.guidance, tokens)
    return every_row.under(recipe.sampling)


def _prompts(options: Options, defaults: ModelDefaults, faults: Faults) -> list[str]:
    asked = (options.prompts, options.last, options.limit)
    limit = DEFAULT_LIMIT if asked == (None, None, None) else options.limit
    with faults.gather():
        source = defaults.prompts if options.prompts is None else options.prompts
        return read_prompts(source, last=options.last, limit=limit)
    return []


def _prompt_source(options: Options, defaults: ModelDefaults) -> str:
    source = str(defaults.prompts if options.prompts is None else options.prompts)
    return source if options.last is None else f"{source}, last {options.last}"
