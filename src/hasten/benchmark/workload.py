"""From options to the frozen workload that every row renders. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hasten.benchmark.faults import Faults
from hasten.models.defaults import ModelDefaults, defaults_for
from hasten.prompts import read_prompts
from hasten.recipe import Recipe, parse_size
from hasten.results import Prompt, Workload

__all__ = ["Options", "PassSettings", "resolve_workload", "settings_of"]

DEFAULT_LIMIT = 50
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Options:
    """What was asked for; None means the model's own default."""

    model: str = "tiny"
    prompts: str | Path | None = None
    last: int | None = None
    limit: int | None = None
    steps: int | None = None
    size: str | None = None
    seed: int = 0
    guidance: float | None = None
    max_sequence_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    rounds: int = 1


@dataclass(frozen=True)
class PassSettings:
    """What one row calls the pipeline with: pixels, steps, guidance scale, T5 tokens."""

    width: int
    height: int
    steps: int
    guidance: float | None
    max_sequence_length: int


def resolve_workload(options: Options, faults: Faults) -> Workload:
    """The workload of `options`, `dtype` still as asked; what is wrong goes into `faults`.

    Prompt i is drawn with seed `options.seed + i`. Without a file, `last` and `limit`, the first
    50 prompts of the model's bundled set are taken. After a fault the value is a stand-in, so
    that everything that follows can still be looked at.
    """
    defaults = ModelDefaults()
    with faults.gather():
        defaults = defaults_for(options.model)
    width, height = defaults.width, defaults.height
    if options.size is not None:
        with faults.gather():
            width, height = parse_size(options.size)
    if options.dtype not in DTYPES:
        faults.add(f"dtype {options.dtype!r} is not known", f"choose one of {', '.join(DTYPES)}")
    prompts = _prompts(options, defaults, faults)
    seed = _whole("seed", options.seed, 0, (0, MAX_SEED - len(prompts)), faults)
    return Workload(
        model=options.model,
        width=width,
        height=height,
        steps=_whole("steps", options.steps, defaults.steps, (1, 1000), faults),
        guidance=_guidance(options.guidance, defaults.guidance, faults),
        seed=seed,
        dtype=options.dtype,
        prompt_source=_prompt_source(options, defaults),
        prompts=tuple(
            Prompt(id=index, text=text, seed=seed + index) for index, text in enumerate(prompts)
        ),
        max_sequence_length=_whole(
            "max_sequence_length",
            options.max_sequence_length,
            defaults.max_sequence_length,
            (1, 512),
            faults,
        ),
        rounds=_whole("rounds", options.rounds, 1, (1, 100), faults),
    )


def settings_of(recipe: Recipe, workload: Workload) -> PassSettings:
    """The workload's settings, overridden by what the recipe's `[sampling]` sets."""
    width, height = workload.width, workload.height
    tokens = workload.max_sequence_length or ModelDefaults().max_sequence_length
    sampling = recipe.sampling
    if sampling is None:
        return PassSettings(width, height, workload.steps, workload.guidance, tokens)
    if sampling.size is not None:
        width, height = parse_size(sampling.size)
    return PassSettings(
        width,
        height,
        sampling.steps or workload.steps,
        workload.guidance if sampling.guidance is None else sampling.guidance,
        sampling.max_sequence_length or tokens,
    )


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


def _whole(
    name: str, value: int | None, default: int, bounds: tuple[int, int], faults: Faults
) -> int:
    if value is None:
        return default
    low, high = bounds
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        faults.add(
            f"{name} = {value!r} is not a whole number from {low} to {high}",
            f"the default of {name} is {default}",
        )
        return default
    return value


def _guidance(value: float | None, default: float, faults: Faults) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        faults.add(
            f"guidance = {value!r} is not a number from 0 to 100",
            f"the default of guidance is {default:g}",
        )
        return default
    return float(value)
