"""The race's results files: one `results.json` for each size and group, each with its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.peers.record import Record
from studies.peers.workload import Workload

from hasten import results
from hasten.report import write_report
from hasten.results import Environment, Prompt, Results, with_speedups
from hasten.results_file import write_results

__all__ = ["all_results", "write_all", "write_reports"]


def all_results(
    records: Sequence[Record], workload: Workload, environment: Environment, command: str
) -> dict[str, Results]:
    """Results by folder: SIZE, and SIZE-group-N for further groups.

    Rows that did not get as far as a group stand in the last one.
    """
    last = max((record.group or 0 for record in records), default=0)
    found = {}
    for group in range(last + 1):
        rows = [one for one in records if group == (last if one.group is None else one.group)]
        if not rows or rows[0].role != "baseline":
            rows.insert(0, next(one for one in records if one.role == "baseline"))
        for size in workload.sizes:
            name = f"{size}-group-{group}" if group else str(size)
            made = [record.row(size, workload.steps) for record in rows]
            made[0] = made[0].model_copy(update={"notes": (*made[0].notes, f"`{command}`")})
            found[name] = with_speedups(_workload(workload, size), environment, made)
    return found


def _workload(workload: Workload, size: int) -> results.Workload:
    """Images are drawn from random text embeddings: there is one prompt, which every round draws
    again."""
    return results.Workload(
        model=workload.model,
        width=size,
        height=size,
        steps=workload.steps,
        guidance=workload.guidance,
        seed=0,
        dtype=workload.dtype,
        prompt_source="random text embeddings, others in each round",
        prompts=(Prompt(id=0, text="random text embeddings", seed=0),),
        max_sequence_length=workload.tokens,
        rounds=workload.rounds,
    )


def write_all(found: dict[str, Results], out: Path) -> None:
    """Write each `results.json`; a run that is cut off leaves the last whole ones."""
    for name, one in found.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        write_results(out / name / "results.json", one)


def write_reports(found: dict[str, Results], out: Path) -> None:
    """Write the product's table, plot and page beside each `results.json`."""
    for name in found:
        write_report(out / name / "results.json", out / name)
