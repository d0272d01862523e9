"""Determines the rows of a benchmark and their order. Does not import torch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, repeat

from hasten.errors import Faults
from hasten.passes.cache.plan import computed_steps
from hasten.recipe import Recipe, Sampling, resolve
from hasten.results import BASELINE, BASELINE_AGAIN, Role

DEFAULT_RECIPES = ("baseline", "compile", "cache", "cache-compile")
LONGEST_NAME = 64


@dataclass(frozen=True)
class PlannedRow:
    """A row before it is measured.

    Attributes:
        name: The row's name, which is also the name of its files.
        recipe: What it measures.
        role: As in `hasten.results.Row`.
        rival_of: As in `hasten.results.Row`.
        notes: Notes to add to the measured row.
    """

    name: str
    recipe: Recipe
    role: Role = "recipe"
    rival_of: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_rows(
    recipes: Sequence[Recipe], steps: int, references: Sequence[str], faults: Faults
) -> tuple[PlannedRow, ...]:
    """Plan the rows, in the order of the first round.

    `baseline` is always first and `baseline-again` last. Other references come right after the
    baseline, because later rows are scored against them. The remaining recipes keep their order.
    Each row with a TensorRT engine is followed by its graph on a CPU (see `graph_of`), and each
    cached row by its rival (see `with_rivals`). A recipe that is given twice is one row; a recipe
    that is given under two names is two rows. Their notes mention either case.

    Args:
        recipes: The requested recipes.
        steps: Number of inference steps of the workload.
        references: Names of the rows to score against.
        faults: Faults are added here.
    """
    plain = resolve(BASELINE)
    rows = {BASELINE: PlannedRow(BASELINE, plain, "baseline")}
    for recipe in sorted(recipes, key=lambda recipe: recipe.name not in references):
        _add(PlannedRow(recipe.name, recipe, _role(recipe, "recipe")), rows, faults)
    for recipe in recipes:
        graph = graph_of(recipe)
        if graph is not None and not _same(rows.get(graph.name, graph).recipe, graph.recipe):
            faults.add(*_name_taken(graph.name))
        elif graph is not None and graph.name not in rows:
            rows = _inserted(graph, recipe.name, rows)
    if BASELINE_AGAIN in rows:
        faults.add(*_name_taken(BASELINE_AGAIN))
    last = PlannedRow(BASELINE_AGAIN, plain, "baseline")
    planned = with_rivals((*map(_noted, rows.values(), repeat(rows)), last), steps, {})
    names = [row.name for row in planned[:-1]]
    for reference in references:
        if reference not in names:
            faults.add(
                f"reference {reference!r} is not a row of this benchmark",
                f"add it to the recipes, or choose one of {', '.join(names)}",
            )
    return planned


def with_rivals(
    rows: Sequence[PlannedRow], steps: int, measured: Mapping[str, float]
) -> tuple[PlannedRow, ...]:
    """The rows, with each cached row followed by its rival.

    If a row with the rival's recipe exists under any name, no row is added; that row becomes the
    rival.

    Args:
        rows: The rows so far.
        steps: Number of inference steps of the workload.
        measured: Mean number of steps that rows computed, by row name. A cache whose number of
            computed steps depends on the image has no rival until its row is measured.
    """
    joined = list(rows)
    for row in rows:
        rival = rival_of(row.recipe, steps, measured.get(row.name))
        if rival is None:
            continue
        for place, other in enumerate(joined):
            if _same(other.recipe, rival.recipe):
                names = dict.fromkeys((*other.rival_of, row.name))
                joined[place] = replace(other, rival_of=tuple(names))
                break
        else:
            place = [other.name for other in joined].index(row.name) + 1
            rival = _renamed(rival, taken={row.name for row in joined})
            joined.insert(place, replace(rival, rival_of=(row.name,)))
    return tuple(joined)


def rival_of(recipe: Recipe, steps: int, measured: float | None = None) -> PlannedRow | None:
    """The fewer-steps rival of a cached recipe: the same number of steps without a cache.

    It is named `fewer-steps-K` if it sets only the number of steps, otherwise `NAME-fewer-steps-K`.

    Args:
        recipe: Any recipe.
        steps: Number of inference steps of the workload.
        measured: Mean number of steps that the recipe computed. Needed if that number depends on
            the image.

    Returns:
        The rival; None if the recipe has no cache, or `measured` is needed and missing.
    """
    if recipe.cache is None:
        return None
    sampling = recipe.sampling or Sampling.model_validate({})
    computed = computed_steps(recipe.cache, sampling.steps or steps)
    if computed is None:
        if measured is None:
            return None
        computed = max(1, round(measured))
    fewer = Sampling.model_validate({**dict(sampling), "steps": computed})
    name = f"fewer-steps-{computed}"
    rival = recipe.but(
        cache=None,
        sampling=fewer,
        description=f"{recipe.name} without its cache, in {computed} steps",
    )
    only_steps = Recipe(sampling=Sampling.model_validate({"steps": computed}))
    if not _same(rival, only_steps):
        name = f"{recipe.name[: LONGEST_NAME - len(name) - 1]}-{name}"
    return PlannedRow(name, rival.but(name=name), _role(rival, "rival"))


def graph_of(recipe: Recipe) -> PlannedRow | None:
    """The row that scores a TensorRT engine's graph on a CPU; None for other recipes."""
    if recipe.engine is None or recipe.engine.kind != "tensorrt":
        return None
    suffix = "-onnxruntime"
    name = f"{recipe.name[: LONGEST_NAME - len(suffix)]}{suffix}"
    engine = recipe.engine.model_copy(update={"kind": "onnxruntime"})
    description = f"the graph of {recipe.name} on a CPU, to measure its quality, not its speed"
    return PlannedRow(name, recipe.but(name=name, engine=engine, description=description), "graph")


def rotated(rows: Sequence[PlannedRow], turn: int) -> tuple[PlannedRow, ...]:
    """The rows in the order of round `turn`: all but the two baselines are rotated by `turn`."""
    first, *middle, last = rows
    cut = turn % len(middle) if middle else 0
    return (first, *middle[cut:], *middle[:cut], last)


def _add(row: PlannedRow, rows: dict[str, PlannedRow], faults: Faults) -> None:
    known = rows.setdefault(row.name, row)
    if not _same(known.recipe, row.recipe):
        faults.add(*_name_taken(row.name))
    elif known is not row and row.name != BASELINE:
        rows[row.name] = replace(known, notes=("given more than once, measured once",))


def _inserted(row: PlannedRow, after: str, rows: Mapping[str, PlannedRow]) -> dict[str, PlannedRow]:
    order = list(rows.values())
    order.insert(list(rows).index(after) + 1, row)
    return {row.name: row for row in order}


def _noted(row: PlannedRow, rows: Mapping[str, PlannedRow]) -> PlannedRow:
    """The row, with a note if an earlier row has the same recipe under another name."""
    first = next(other.name for other in rows.values() if _same(other.recipe, row.recipe))
    if first == row.name:
        return row
    return replace(row, notes=(*row.notes, f"the same recipe as {first}"))


def _role(recipe: Recipe, otherwise: Role) -> Role:
    """`graph` for an engine's graph on a CPU, whose speed is not compared; else `otherwise`."""
    on_cpu = recipe.engine is not None and recipe.engine.kind == "onnxruntime"
    return "graph" if on_cpu else otherwise


def _renamed(row: PlannedRow, taken: Container[str]) -> PlannedRow:
    """The row under its own name or, if that is taken, with a number appended."""
    numbered = (f"{row.name[: LONGEST_NAME - 4]}-{number}" for number in count(2))
    name = next(name for name in chain([row.name], numbered) if name not in taken)
    return replace(row, name=name, recipe=row.recipe.but(name=name))


def _same(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes are equal apart from name and description."""
    return one.but(name="x", description="") == other.but(name="x", description="")


def _name_taken(name: str) -> tuple[str, str]:
    return (
        f"two different recipes have the row name {name!r}",
        "give your recipe another name: name = ... in its first line",
    )
