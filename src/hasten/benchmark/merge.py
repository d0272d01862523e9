"""One row from its rounds, and the results from the rows. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hasten.results import (
    Environment,
    Results,
    Row,
    StepsComputed,
    Workload,
    summarize_seconds,
)

__all__ = ["assemble", "pooled"]


def pooled(rounds: Sequence[Row]) -> Row:
    """One row from at least one round of it.

    Samples of all rounds are pooled, of the transformer's times the median is taken, of the memory
    the largest. Setup, pictures and quality are the first round's. A round that is not ok makes
    the row so.
    """
    for turn, row in enumerate(rounds):
        if row.status != "ok":
            return row.model_copy(update={"reason": _in_round(turn, row.reason)})
    first = rounds[0]
    samples = [value for row in rounds if (s := row.seconds_per_image) for value in s.samples]
    steps = [row.steps_computed for row in rounds if row.steps_computed]
    times = [row.transformer_ms_per_step for row in rounds if row.transformer_ms_per_step]
    changes = {
        "seconds_per_image": summarize_seconds(samples),
        "notes": tuple(dict.fromkeys(note for row in rounds for note in row.notes)),
        "peak_memory_bytes": max(row.peak_memory_bytes or 0 for row in rounds),
        "transformer_ms_per_step": statistics.median(times),
        "steps_computed": StepsComputed(
            mean=statistics.fmean(step.mean for step in steps),
            min=min(step.min for step in steps),
            max=max(step.max for step in steps),
        ),
    }
    return first.model_copy(update=changes)


def assemble(
    workload: Workload, environment: Environment, measured: Sequence[Sequence[Row]]
) -> Results:
    """Results from each row's rounds, in the table's order, the baseline first; speed-ups added,
    but none to a row that is there for its quality only."""
    rows = [pooled(rounds) for rounds in measured]
    baseline = rows[0].seconds_per_image
    finished = []
    for row in rows:
        changes = {}
        timed = None if row.quality_only else row.seconds_per_image
        if baseline and timed and timed.median:
            changes["speedup"] = baseline.median / timed.median
        finished.append(Row.model_validate({**dict(row), **changes}))
    return Results(workload=workload, environment=environment, rows=tuple(finished))


def _in_round(turn: int, reason: str | None) -> str | None:
    return f"round {turn + 1}: {reason}" if turn else reason
