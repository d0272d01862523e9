"""The benchmark: plan the rows, run each in a process of its own, write what they found."""

from __future__ import annotations

import inspect
import os
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hasten import errors
from hasten.atomic import write_text
from hasten.benchmark.display import ShownResults
from hasten.benchmark.job import HASTEN_ENGINE, Job, Outcome
from hasten.benchmark.plan import BenchmarkPlan, Options, Turn, plan_benchmark
from hasten.benchmark.rows import DEFAULT_RECIPES
from hasten.benchmark.store import BenchmarkStore, absolute
from hasten.errors import Faults, HastenError
from hasten.log import logger
from hasten.process import how_it_ended, run_module
from hasten.progress import Progress, shown
from hasten.recipe import Recipe
from hasten.results import (
    BASELINE,
    BASELINE_AGAIN,
    Results,
    Row,
    StepsComputed,
    summarize_seconds,
    with_speedups,
)
from hasten.results_file import write_results

Done = dict[tuple[str, int], Outcome]


def bench(
    model: str = "tiny",
    recipes: Sequence[str | Path | Recipe] = DEFAULT_RECIPES,
    out: str | os.PathLike[str] = "out",
    *,
    prompts: str | Path | None = None,
    last: int | None = None,
    limit: int | None = None,
    steps: int | None = None,
    size: str | None = None,
    seed: int = 0,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    rounds: int = 1,
    references: Sequence[str] = (BASELINE,),
    force: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Render the same prompts under several recipes and write results, pictures and a report.

    Every recipe gets a row, in a process of its own; `baseline` is rendered first and last, and a
    recipe with a cache is followed by its fewer-steps rival, `fewer-steps-K`, where K is the number
    of steps that it computes (if that depends on the image, the rounded mean of its first round).
    Speed-ups are over the mean of the two baselines. What is not given comes from the model's
    defaults; a recipe's `[sampling]` overrides it for its own row.

    Args:
        out: Folder that is written to, by one benchmark at a time.
        references: Rows whose pictures the others are scored against.
        force: Run schedules learned on another model too; their rows say so.
        resume: Keep the rows that `out` has, if weights, recipes, environment and machine are those
            they were measured with.
        overwrite: Replace the files of an earlier benchmark in `out`.
        progress: Called with what is happening, how much of it is done, and of how much. By
            default, a bar in a terminal or a notebook.

    Returns:
        The results; a notebook shows them as a table with pictures.

    Raises:
        InputError, RecipeError, ModelError: Before anything is rendered; or later, if the weights
            change meanwhile. A row that fails does not raise, it has a status and a reason.
        HastenError: The disk is full, or `out` has vanished. What is finished can be resumed.
        KeyboardInterrupt: The finished rows are on disk.
    """
    given = locals()
    options = Options(**{field.name: given[field.name] for field in fields(Options)})
    store = BenchmarkStore(absolute(out), resume=resume, overwrite=overwrite)
    with shown(progress) as report:
        plan = plan_benchmark(options, recipes, references, store)
        plan = replace(plan, command=_command(given))
        return ShownResults.of(run_plan(plan, store, progress=report), store.out)


def _command(given: Mapping[str, Any]) -> str:
    """The command line for these arguments of `bench`, without defaults, and without the folder:
    what repeats the measurement, wherever it is written to."""
    words = ["hasten", "bench"]
    for name, parameter in inspect.signature(bench).parameters.items():
        value = given[name]
        if name in ("out", "resume", "overwrite", "progress") or value == parameter.default:
            continue
        if name in ("recipes", "references"):
            value = ",".join(one.name if isinstance(one, Recipe) else str(one) for one in value)
        option = "--reference" if name == "references" else f"--{name.replace('_', '-')}"
        words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def run_plan(
    plan: BenchmarkPlan,
    store: BenchmarkStore,
    *,
    progress: Progress | None = None,
    engine: str = HASTEN_ENGINE,
) -> Results:
    """Run the rows that are not there yet; write results after each row and a report at the end.

    Where a row has to be measured before its rival is known, the plan grows on the way.
    """
    with store.owned():
        done: Done = {}
        if store.resume:
            done = _finished(plan, store)
            grown = plan.with_rivals(_steps_computed(done))
            if grown != plan:
                plan, done = grown, _finished(grown, store)
        store.open(plan.rows, plan.workload)
        try:
            while turn := next((turn for turn in plan.turns() if turn.key not in done), None):
                turns = [turn.key for turn in plan.turns()]
                show = _shown(
                    progress, f"{turn.row.name} ({turns.index(turn.key) + 1}/{len(turns)})"
                )
                done[turn.key] = _run_row(_job(plan, store, turn, done, engine), turn, store, show)
                store.write_row(done[turn.key], turn.round, plan.identity(turn.row))
                plan = plan.with_rivals(_steps_computed(done))
                store.note(plan.rows, plan.workload)  # new rows are its own too
                write_results(store.out / "results.json", _results(plan, done))
        except KeyboardInterrupt:
            if (BASELINE, 0) in done:
                with suppress(HastenError, OSError):
                    _write(plan, store, done)
            raise
        store.close()
        return _write(plan, store, done)


def _finished(plan: BenchmarkPlan, store: BenchmarkStore) -> Done:
    """Rows measured before. If anything is left to do, references whose pictures are gone are
    measured again to score it, and the last baseline, because it has to come after it."""
    done = {}
    faults = Faults()
    for turn in plan.turns():
        with faults.gather():
            outcome = store.finished_row(turn.row, turn.round, plan.identity(turn.row))
            if outcome is not None:
                done[turn.key] = outcome
    if len({outcome.weights for outcome in done.values()}) > 1:
        faults.add(
            f"{store.out}: cannot resume: its rows were measured with different weights",
            "choose another --out, or replace --resume by --overwrite",
        )
    faults.raise_any()
    if any((planned.name, 0) not in done for planned in plan.rows):
        for name in plan.references:
            if (name, 0) in done and not store.has_floats(name, plan.workload):
                done.pop((name, 0), None)
    for number in {turn.round for turn in plan.turns() if turn.key not in done}:
        done.pop((BASELINE_AGAIN, number), None)
    return done


def _steps_computed(done: Done) -> dict[str, float]:
    """Mean number of steps that each row computed in its first round."""
    return {
        name: outcome.row.steps_computed.mean
        for (name, turn), outcome in done.items()
        if turn == 0 and outcome.row.steps_computed
    }


def _job(plan: BenchmarkPlan, store: BenchmarkStore, turn: Turn, done: Done, engine: str) -> Job:
    """What the row's process gets. Only the first round has pictures and is scored."""
    name = turn.row.name
    references = {}
    for reference in () if turn.round else plan.references:
        if reference != name and (reference, 0) in done:
            usable = done[reference, 0].row.status == "ok"
            references[reference] = str(store.floats(reference)) if usable else None
    weights = (outcome.weights for outcome in done.values() if outcome.weights)
    return Job(
        row=name,
        role=turn.row.role,
        toml=turn.row.recipe.to_toml(),
        workload=plan.workload,
        device=plan.environment.device,
        weights=next(weights, None),
        images=None if turn.round else str(store.images(name)),
        floats=str(store.floats(name)),
        keep_floats=name in plan.references,
        references=references,
        outcome=str(store.work_file(name, turn.round, "outcome")),
        force=plan.force,
        engine=engine,
    )


def _run_row(
    job: Job, turn: Turn, store: BenchmarkStore, show: Callable[[dict[str, Any]], None]
) -> Outcome:
    """Run the job in a new process; a process that dies makes a failed row too.

    Raises what its process refused to work with, if no other row could do better: the model, the
    device, the disk.
    """
    outcome_file = Path(job.outcome)
    outcome_file.unlink(missing_ok=True)
    job_file = store.work_file(job.row, turn.round, "job")
    write_text(job_file, job.model_dump_json())
    log = store.log_file(job.row, turn.round)
    log.unlink(missing_ok=True)
    try:
        status = run_module("hasten.benchmark.row", str(job_file), log=log, on_message=show)
    finally:
        store.remove_drafts(job.row)
    if not outcome_file.exists():
        reason = f"{how_it_ended(status)}; see {log.relative_to(store.out)}"
        row = Row(recipe=job.row, role=job.role, status="failed", reason=reason, toml=job.toml)
        return Outcome(row=row)
    outcome = Outcome.model_validate_json(outcome_file.read_text("utf-8"))
    refusal = outcome.refusal
    if refusal and (refusal.final or job.row == BASELINE):
        kind: type[HastenError] = getattr(errors, refusal.kind)
        raise kind(refusal.faults, refusal.fix)
    return outcome


def _results(plan: BenchmarkPlan, done: Done) -> Results:
    """The results so far: every row of which at least one round is done."""
    rounds = range(plan.workload.rounds)
    rows = []
    names = {name for name, _ in done}
    for planned in plan.rows:
        measured = [done[key].row for number in rounds if (key := (planned.name, number)) in done]
        if measured:
            row = pooled(measured)
            why = {
                "role": planned.role,
                "rival_of": tuple(name for name in planned.rival_of if name in names),
                "notes": tuple(dict.fromkeys((*row.notes, *planned.notes))),
            }
            rows.append(row.model_copy(update=why))
    return with_speedups(plan.workload, plan.environment, rows, plan.command)


def pooled(rounds: Sequence[Row]) -> Row:
    """One row from at least one round of it.

    Samples of all rounds are pooled, of the transformer's times the median is taken, of the memory
    the largest. Setup, pictures and quality are the first round's. A round that is not ok makes
    the row so.
    """
    for turn, row in enumerate(rounds):
        if row.status != "ok":
            reason = f"round {turn + 1}: {row.reason}" if turn else row.reason
            return row.model_copy(update={"reason": reason})
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


def _write(plan: BenchmarkPlan, store: BenchmarkStore, done: Done) -> Results:
    from hasten.report import write_report  # matplotlib takes its time

    results = _results(plan, done)
    write_results(store.out / "results.json", results)
    write_report(results, store.out)
    return results


def _shown(progress: Progress | None, title: str) -> Callable[[dict[str, Any]], None]:
    def show(message: dict[str, Any]) -> None:
        if "line" in message:
            logger.info("%s: %s", title, message["line"])
        elif progress is not None:
            progress(f"{title}: {message['stage']}", message["done"], message["total"])

    return show
