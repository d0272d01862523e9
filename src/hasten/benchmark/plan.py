"""Everything that is decided before the first row starts, from everything that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hasten.benchmark.environment import look_in_process
from hasten.benchmark.rows import PlannedRow, joined_by_rivals, plan_rows, rotated
from hasten.benchmark.store import Identity, Store
from hasten.benchmark.workload import Options, resolve_workload
from hasten.errors import Faults
from hasten.recipe import Recipe, resolve
from hasten.results import BASELINE, Environment, Workload

__all__ = ["Plan", "Turn", "make_plan"]


@dataclass(frozen=True)
class Turn:
    """One rendering of one row; round 0 is the first."""

    row: PlannedRow
    round: int

    @property
    def key(self) -> tuple[str, int]:
        return self.row.name, self.round


@dataclass(frozen=True)
class Plan:
    """The workload, where it runs (`device` is resolved), and the rows in the table's order.

    `force` lets rows use schedules learned on another model.
    """

    workload: Workload
    environment: Environment
    device: str
    rows: tuple[PlannedRow, ...]
    references: tuple[str, ...]
    force: bool = False

    def turns(self) -> list[Turn]:
        """Every rendering, in order: each round rotates the rows between the baselines."""
        return [
            Turn(row, number)
            for number in range(self.workload.rounds)
            for row in rotated(self.rows, number)
        ]

    def joined_by_rivals(self, measured: Mapping[str, float]) -> Plan:
        """The plan once more is known: `measured` has the mean number of steps that rows computed
        in their first round."""
        return replace(self, rows=joined_by_rivals(self.rows, self.workload.steps, measured))

    def identity(self, row: PlannedRow) -> Identity:
        """What a row of this plan is measured with."""
        return Identity.of(self.workload, self.environment, self.references, row)


def make_plan(
    options: Options,
    recipes: Sequence[str | Path | Recipe],
    references: Sequence[str],
    store: Store,
) -> Plan:
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
    here = look_in_process(options.device, options.dtype)
    if here.fault:
        faults.add(here.fault, here.fix)
    faults.raise_any()
    workload = workload.model_copy(update={"dtype": here.dtype})
    return Plan(workload, here.environment, here.device, rows, all_references, options.force)
