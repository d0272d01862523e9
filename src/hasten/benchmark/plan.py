"""Resolves options to the plan of a benchmark: workload, environment and rows in order.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hasten.benchmark.environment import detect_in_process, host
from hasten.benchmark.rows import PlannedRow, plan_rows, rotated, with_rivals
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
    """Options of a benchmark as the user gave them.

    Attributes:
        prompts: A bundled set or a file; None for the model's set.
        last: Use only this many prompts from the end.
        limit: Of these, use only this many from the start. If neither `prompts` nor `last` nor
            `limit` is given, it is 50.
        rounds: How often each row renders the prompts.
        force: Whether to use schedules learned on another model.
    """

    prompts: str | Path | None = None
    last: int | None = None
    limit: int | None = None
    rounds: int = 1
    force: bool = False


@dataclass(frozen=True)
class Turn:
    """One round of one row; the first round is 0."""

    row: PlannedRow
    round: int

    @property
    def key(self) -> tuple[str, int]:
        return self.row.name, self.round


@dataclass(frozen=True)
class BenchmarkPlan:
    """A resolved benchmark.

    Attributes:
        workload: What every row renders.
        environment: Where it runs.
        rows: In the table's order.
        references: Names of the rows that every row is scored against.
        force: Whether rows may use schedules learned on another model.
        command: Command line that repeats the benchmark; None if it is unknown.
    """

    workload: Workload
    environment: Environment
    rows: tuple[PlannedRow, ...]
    references: tuple[str, ...]
    force: bool = False
    command: str | None = None

    def turns(self) -> list[Turn]:
        """All rounds of all rows, in order. Each round rotates the rows between the baselines."""
        return [
            Turn(row, number)
            for number in range(self.workload.rounds)
            for row in rotated(self.rows, number)
        ]

    def with_rivals(self, measured: Mapping[str, float]) -> BenchmarkPlan:
        """The plan with the rivals of caches whose number of computed steps is now known.

        Args:
            measured: Mean number of steps that rows computed in their first round, by row name.
        """
        return replace(self, rows=with_rivals(self.rows, self.workload.steps, measured))

    def identity(self, row: PlannedRow) -> Identity:
        """Everything that the measurements of a row depend on."""
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
    """Resolve and check all inputs of a benchmark.

    Args:
        options: Model, workload and device.
        recipes: The recipes to measure.
        references: Names of further rows to score against.
        store: The output folder.

    Raises:
        HastenError: Any input is invalid; every fault is listed.
    """
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
        faults.raise_any()  # these two are always available, so detection adds no fault
    detected = detect_in_process(options.model, options.device, options.dtype)
    if detected.fault:
        faults.add(detected.fault, detected.fix)
    faults.raise_any()
    if detected.too_large:
        raise UnsupportedError(*detected.too_large)
    workload = workload.model_copy(update={"dtype": detected.dtype})
    return BenchmarkPlan(workload, detected.environment, rows, all_references, options.force)


def resolve_workload(options: Options, faults: Faults) -> Workload:
    """The workload of `options`, with `dtype` as given.

    Prompt i has the seed `options.seed + i`. Invalid values are added to `faults` and replaced by a
    default, so that the other inputs can still be checked.
    """
    if not options.model.isprintable():
        faults.add(f"{options.model!a} has characters that are not printable", "rename the model")
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
    """The workload's settings, overridden by those that the recipe's `[sampling]` sets."""
    tokens = workload.max_sequence_length or ModelDefaults().max_sequence_length
    settings = Settings(workload.width, workload.height, workload.steps, workload.guidance, tokens)
    return settings.under(recipe.sampling)


def _prompts(options: Options, defaults: ModelDefaults, faults: Faults) -> list[str]:
    selection = (options.prompts, options.last, options.limit)
    limit = DEFAULT_LIMIT if selection == (None, None, None) else options.limit
    with faults.gather():
        source = defaults.prompts if options.prompts is None else options.prompts
        return read_prompts(source, last=options.last, limit=limit)
    return []


def _prompt_source(options: Options, defaults: ModelDefaults) -> str:
    source = str(defaults.prompts if options.prompts is None else options.prompts)
    source = source.encode(errors="backslashreplace").decode()
    return source if options.last is None else f"{source}, last {options.last}"
