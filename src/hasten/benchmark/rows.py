"""Which rows a benchmark has, and in what order they run. No torch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

from hasten.errors import Faults
from hasten.passes.cache.plan import computed_steps
from hasten.recipe import Recipe, Sampling, resolve
from hasten.results import BASELINE, BASELINE_AGAIN

__all__ = ["DEFAULT_RECIPES", "PlannedRow", "joined_by_rivals", "plan_rows", "rotated"]

DEFAULT_RECIPES = ("baseline", "compile", "cache", "cache-compile")
LONGEST_NAME = 64


@dataclass(frozen=True)
class PlannedRow:
    """A row's name, which is also its file name, and the recipe it measures."""

    name: str
    recipe: Recipe


def plan_rows(
    recipes: Sequence[Recipe], steps: int, references: Sequence[str], faults: Faults
) -> tuple[PlannedRow, ...]:
    """Rows in the order in which they are rendered for the first time.

    `baseline` first and `baseline-again` last, always. Other references come right after the
    baseline, because everything behind them is scored against them. The rest keeps its order;
    each row with a TensorRT engine is followed by its graph on a CPU (see `graph_of`), and
    each row that caches by its rival (see `rival_of`), or is joined by it later, where
    only the row itself can say how many steps it computes (see `joined_by_rivals`). The same recipe
    twice is one row.
    """
    plain = resolve(BASELINE)
    rows = {BASELINE: PlannedRow(BASELINE, plain)}
    for recipe in sorted(recipes, key=lambda recipe: recipe.name not in references):
        _add(PlannedRow(recipe.name, recipe), rows, faults)
        for companion in (graph_of(recipe), rival_of(recipe, steps)):
            if companion is not None:
                _add(companion, rows, faults)
    if BASELINE_AGAIN in rows:
        faults.add(*_name_taken(BASELINE_AGAIN))
    for reference in references:
        if reference not in rows:
            faults.add(
                f"reference {reference!r} is not a row of this benchmark",
                f"add it to the recipes, or choose one of {', '.join(rows)}",
            )
    return (*rows.values(), PlannedRow(BASELINE_AGAIN, plain))


def joined_by_rivals(
    rows: Sequence[PlannedRow], steps: int, measured: Mapping[str, float]
) -> tuple[PlannedRow, ...]:
    """The rows, each one that decides for itself what it computes followed by its rival.

    `measured` has the mean number of steps that such a row computed, once it has run. A rival that
    is there already, under whatever name, is not added again.
    """
    joined = list(rows)
    for row in rows:
        rival = rival_of(row.recipe, steps, measured.get(row.name))
        if rival is not None and not any(_same(row.recipe, rival.recipe) for row in joined):
            place = joined.index(row) + 1
            joined.insert(place, _renamed(rival, taken={row.name for row in joined}))
    return tuple(joined)


def rival_of(recipe: Recipe, steps: int, measured: float | None = None) -> PlannedRow | None:
    """The honest rival of a recipe that caches: no cache, and as many steps as it computes.

    `measured` is the mean number of steps it has computed, for a cache that cannot tell before; it
    has no rival until then. Where only the number of steps is left in the rival, it is called
    `fewer-steps-K`, else `NAME-fewer-steps-K`.
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
    return PlannedRow(name, rival.but(name=name))


def graph_of(recipe: Recipe) -> PlannedRow | None:
    """The row beside an engine of TensorRT: its very graph on a CPU, for the pictures."""
    if recipe.engine is None or recipe.engine.kind != "tensorrt":
        return None
    suffix = "-onnxruntime"
    name = f"{recipe.name[: LONGEST_NAME - len(suffix)]}{suffix}"
    engine = recipe.engine.model_copy(update={"kind": "onnxruntime"})
    described = f"the graph of {recipe.name} on a CPU, for its pictures and not for speed"
    return PlannedRow(name, recipe.but(name=name, engine=engine, description=described))


def rotated(rows: Sequence[PlannedRow], turn: int) -> tuple[PlannedRow, ...]:
    """The order of round `turn` (0 is the first): all but the two baselines move up by `turn`."""
    first, *middle, last = rows
    cut = turn % len(middle) if middle else 0
    return (first, *middle[cut:], *middle[:cut], last)


def _add(row: PlannedRow, rows: dict[str, PlannedRow], faults: Faults) -> None:
    if not _same(rows.setdefault(row.name, row).recipe, row.recipe):
        faults.add(*_name_taken(row.name))


def _renamed(row: PlannedRow, taken: Container[str]) -> PlannedRow:
    """The row under its name, or the first free one that is made of it."""
    numbered = (f"{row.name[: LONGEST_NAME - 4]}-{number}" for number in count(2))
    name = next(name for name in chain([row.name], numbered) if name not in taken)
    return PlannedRow(name, row.recipe.but(name=name))


def _same(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes do the same, whatever they are called."""
    return one.but(name="x", description="") == other.but(name="x", description="")


def _name_taken(name: str) -> tuple[str, str]:
    return (
        f"two different recipes would have the row {name!r}",
        "give your recipe another name: its first line is name = ...",
    )
