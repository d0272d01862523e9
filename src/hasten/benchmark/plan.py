"""From the options to what every row renders, on what, and in which order. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hasten.benchmark.environment import host, look_in_process
from hasten.benchmark.rows import PlannedRow, joined_by_rivals, plan_rows, rotated
from hasten.benchmark.store import BenchmarkStore, Identity
from hasten.errors import Faults, UnsupportedError
from hasten.models.defaults import ModelDefaults
from hasten.prompts import read_prompts
from hasten.recipe import Recipe, resolve
from hasten.results import BASELINE, Environment, Prompt, Workload
from hasten.settings import (
    MAX_SEED,
    CallOptions,
    Settings,
    chosen_settings,
    model_defaults,
    whole_number,
)

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


@dataclass(frozen=True)
class Turn:
    """One rendering of one row; round 0 is the first."""

    row: PlannedRow
    round: int

    @property
    def key(self) -> tuple[str, int]:
        return self.row.name, self.round


@dataclass(frozen=True)
class BenchmarkPlan:
    """The workload, where it runs, and the rows in the table's order.

    `force` lets rows use schedules learned on another model; `command` repeats the benchmark.
    """

    workload: Workload
    environment: Environment
    rows: tuple[PlannedRow, ...]
    references: tuple[str, ...]
    force: bool = False
    command: str | None = None

    def turns(self) -> list[Turn]:
        """Every rendering, in order: each round rotates the rows between the baselines."""
        return [
            Turn(row, number)
            for number in range(self.workload.rounds)
            for row in rotated(self.rows, number)
        ]

    def joined_by_rivals(self, measured: Mapping[str, float]) -> BenchmarkPlan:
        """The plan once more is known: `measured` has the mean number of steps that rows computed
        in their first round."""
        return replace(self, rows=joined_by_rivals(self.rows, self.workload.steps, measured))

    def identity(self, row: PlannedRow) -> Identity:
        """What a row of this plan is measured with."""
        workload = self.workload.model_dump(mode="json", exclude={"rounds"})
        environment = self.environment.model_dump(mode="json", exclude={"date"})
        others = {"host": host(), "references": list(self.references)}
        return Identity(facts=workload | environment | others, recipe=row.recipe.to_toml())


def plan_benchmark(
    options: Options,
    recipes: Sequence[str | Path | Recipe],
    references: Sequence[str],
    store: BenchmarkStore,
) -> BenchmarkPlan:
    """Look at all of the input, and raise everything that is wrong with it at once."""
    faults = Faults()
    workload = resolve_workload(options, faults)
    resolved = []
    for recipe in recipes:
        with faults.gather():
            resolved.append(resolve(recipe))
    all_references = tuple(dict.fromkeys((BASELINE, *references)))
    rows = plan_rows(resolved, workload.steps, all_references, faults)
    with faults.gather():
        store.check()
    if options.device in ("auto", "cpu"):
        faults.raise_any()  # these two are always there: no need to look
    here = look_in_process(options.model, options.device, options.dtype)
    if here.fault:
        faults.add(here.fault, here.fix)
    faults.raise_any()
    if here.too_large:
        raise UnsupportedError(*here.too_large)
    workload = workload.model_copy(update={"dtype": here.dtype})
    return BenchmarkPlan(workload, here.environment, rows, all_references, options.force)


def resolve_workload(options: Options, faults: Faults) -> Workload:
    """The workload of `options`, `dtype` still as asked; what is wrong goes into `faults`.

    Prompt i is drawn with seed `options.seed + i`. After a fault the value is a stand-in, so that
    everything that follows can still be looked at.
    """
    if not options.model.isprintable():
        faults.add(f"{options.model!a} has characters that no report can show", "rename the model")
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
    source = source.encode(errors="backslashreplace").decode()
    return source if options.last is None else f"{source}, last {options.last}"
