"""The benchmark: plan the rows, run each in a process of its own, write what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hasten import errors
from hasten.atomic import write_text
from hasten.benchmark.job import HASTEN_ENGINE, Job, Outcome
from hasten.benchmark.merge import assemble
from hasten.benchmark.plan import Plan, Turn, make_plan
from hasten.benchmark.rows import DEFAULT_RECIPES
from hasten.benchmark.store import Store
from hasten.benchmark.workload import Options
from hasten.errors import Faults, HastenError
from hasten.log import logger
from hasten.process import how_it_ended, run_module
from hasten.recipe import Recipe
from hasten.results import BASELINE, Results, Row, write_results
from hasten.user_files import expand_user

__all__ = ["bench", "run_plan"]

Progress = Callable[[str, int, int], None]
Done = dict[tuple[str, int], Row]


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
    progress: Progress | None = None,
) -> Results:
    """Render the same prompts under several recipes and write results, pictures and a report.

    Every recipe gets a row, in a process of its own; `baseline` is rendered first and last, and a
    recipe with a cache is joined by its honest rival, `fewer-steps-K`, where K is the number of
    steps it computes (for a cache that decides as it goes, the rounded mean of its first round).
    What is not given comes from the model's defaults; a recipe's `[sampling]` overrides it for its
    own row. `references` are the rows whose pictures the others are scored against. `force` runs
    schedules learned on another model too, and their rows say so. `resume` keeps the rows that
    `out` already has; otherwise an earlier benchmark's files there are replaced. `progress` hears
    what is happening, how much of it is done, and of how much; the stages of an export are logged.

    Raises InputError, RecipeError or ModelError before anything is rendered; a row that fails does
    not raise, it has a status and a reason. After KeyboardInterrupt the finished rows are on disk.
    """
    options = Options(
        model=model,
        prompts=prompts,
        last=last,
        limit=limit,
        steps=steps,
        size=size,
        seed=seed,
        guidance=guidance,
        max_sequence_length=max_sequence_length,
        device=device,
        dtype=dtype,
        rounds=rounds,
        force=force,
    )
    store = Store(expand_user(out).absolute())
    plan = make_plan(options, recipes, references, store)
    return run_plan(plan, store, resume=resume, progress=progress)


def run_plan(
    plan: Plan,
    store: Store,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    engine: str = HASTEN_ENGINE,
) -> Results:
    """Run the rows that are not there yet; write results after each row and a report at the end.

    Where a row has to be measured before its rival is known, the plan grows on the way.
    """
    done: Done = {}
    if resume:
        plan = plan.joined_by_rivals(_steps_computed(_finished(plan, store)))
        done = _finished(plan, store)
    store.open(plan.rows, plan.workload, resume=resume)
    try:
        while turn := next((turn for turn in plan.turns() if turn.key not in done), None):
            turns = [turn.key for turn in plan.turns()]
            show = _shown(progress, f"{turn.row.name} ({turns.index(turn.key) + 1}/{len(turns)})")
            row = _run_row(_job(plan, store, turn, done, engine), turn, store, show)
            store.write_row(row, turn.round, plan.identity(turn.row))
            done[turn.key] = row
            plan = plan.joined_by_rivals(_steps_computed(done))
            store.open(plan.rows, plan.workload, resume=True)  # new rows are its own too
            write_results(store.out / "results.json", _results(plan, done))
    except KeyboardInterrupt:
        if (BASELINE, 0) in done:
            _write(plan, store, done)
        raise
    store.close()
    return _write(plan, store, done)


def _finished(plan: Plan, store: Store) -> Done:
    """Rows measured before. A reference whose pictures are gone is measured again, unless nothing
    is left to be scored against it."""
    done = {}
    faults = Faults()
    for turn in plan.turns():
        with faults.gather():
            row = store.finished_row(turn.row, turn.round, plan.identity(turn.row))
            if row is not None:
                done[turn.key] = row
    faults.raise_any()
    if any((planned.name, 0) not in done for planned in plan.rows):
        for name in plan.references:
            if not store.has_floats(name, plan.workload):
                done.pop((name, 0), None)
    return done


def _steps_computed(done: Done) -> dict[str, float]:
    """Mean number of steps that each row computed in its first round."""
    return {
        name: row.steps_computed.mean
        for (name, turn), row in done.items()
        if turn == 0 and row.steps_computed
    }


def _job(plan: Plan, store: Store, turn: Turn, done: Done, engine: str) -> Job:
    """What the row's process is told. Only the first round has pictures and is scored."""
    name = turn.row.name
    references = {}
    for reference in () if turn.round else plan.references:
        if reference != name and (reference, 0) in done:
            usable = done[reference, 0].status == "ok"
            references[reference] = str(store.floats(reference)) if usable else None
    return Job(
        row=name,
        toml=turn.row.recipe.to_toml(),
        workload=plan.workload,
        device=plan.device,
        images=None if turn.round else str(store.images(name)),
        floats=str(store.floats(name)),
        keep_floats=name in plan.references,
        references=references,
        outcome=str(store.work_file(name, turn.round, "outcome")),
        force=plan.force,
        engine=engine,
    )


def _run_row(job: Job, turn: Turn, store: Store, show: Callable[[dict[str, Any]], None]) -> Row:
    """Run the job in a new process; a process that dies makes a failed row too.

    Raises what the baseline's process refused to work with (the model, the device): no other row
    could do better.
    """
    outcome_file = Path(job.outcome)
    outcome_file.unlink(missing_ok=True)
    job_file = store.work_file(job.row, turn.round, "job")
    write_text(job_file, job.model_dump_json())
    log = store.log_file(job.row, turn.round)
    status = run_module("hasten.benchmark.row", str(job_file), log=log, on_message=show)
    if not outcome_file.exists():
        reason = f"{how_it_ended(status)}; see {log.relative_to(store.out)}"
        return Row(recipe=job.row, status="failed", reason=reason, toml=job.toml)
    outcome = Outcome.model_validate_json(outcome_file.read_text("utf-8"))
    if outcome.refusal and job.row == BASELINE:
        kind: type[HastenError] = getattr(errors, outcome.refusal.kind)
        raise kind(outcome.refusal.faults, outcome.refusal.fix)
    if outcome.row.status != "ok" or job.images is None:
        return outcome.row
    images = (f"images/{job.row}/{prompt.id:03d}.png" for prompt in job.workload.prompts)
    return outcome.row.model_copy(update={"images": tuple(images)})


def _results(plan: Plan, done: Done) -> Results:
    """The results so far: every row of which at least one round is done."""
    rounds = range(plan.workload.rounds)
    measured = [
        [done[row.name, number] for number in rounds if (row.name, number) in done]
        for row in plan.rows
    ]
    return assemble(plan.workload, plan.environment, [found for found in measured if found])


def _write(plan: Plan, store: Store, done: Done) -> Results:
    from hasten.report import write_report

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
