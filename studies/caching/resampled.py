"""Tests a learned schedule on other numbers of steps, other noise levels and other sizes.

    python -m studies.caching.resampled [--last 24] [--out DIR]

The bundled model's schedule for 17 of 50 steps, against caches and fewer steps that compute as
many steps in the same run; each against the full run under the same settings. Settings of the
others are searched again for every run, the schedule is used as it ships. A few minutes on two
cores; writes DIR/resampled-RUN/results.json for each kind of run and their table, DIR/resampled.md.
Runs whose results are there are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from studies.caching.figure import lpips_of
from studies.caching.methods import METHODS, Method, interval_settings, schedule_method
from studies.caching.results import put, scored_row, workload_of
from studies.caching.row import Bench
from studies.caching.run import RESULTS, SHIPPED
from studies.caching.workload import Frame, Model, Prompt, prompts

from hasten.benchmark.environment import detect_in_process
from hasten.report import write_report
from hasten.results import BASELINE, Results, Row
from hasten.results_file import read_results

__all__ = ["RUNS", "Run", "carried", "markdown", "methods_for", "read_runs"]

SCHEDULE = "tiny-50-17"
SEARCH = 2
BATCH = 4
LEARNED = "learned for it"
CARRIED = "schedule"
COLUMNS = (
    (LEARNED, LEARNED),
    (CARRIED, "17 of 50"),
    ("interval, reuse", "interval, reuse"),
    ("interval, linear", "interval, linear"),
    ("fewer steps, Euler", "fewer, Euler"),
    ("fewer steps, UniPC", "fewer, UniPC"),
)
"""Methods, and what heads their column."""
HEAD = """# Away from where it was learned: `{schedule}`

{source}, float32,
{device}. Mean LPIPS, and below dB of PSNR, against the full run under the same settings. All
columns of a line compute as many steps, unless a number in brackets says how many.
"""


@dataclass(frozen=True)
class Run:
    """A kind of full run, and the schedule that ships for just that, if there is one.

    key: names its folder; name: heads its line in the table.
    """

    key: str
    name: str
    frame: Frame
    learned: str | None = None


def shift_at(side: int) -> float:
    """The shift that FLUX.1-dev's rule gives for a square picture: e to a power linear in the
    number of its tokens (0.5 at 256, 1.15 at 4096)."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return float(torch.tensor(calculate_shift((side // 16) ** 2)).exp())


RUNS = (
    Run("as-learned", "as learned: 50 steps, 128×128, shift 1.5", Frame(), SCHEDULE),
    Run("40-steps", "40 steps", Frame(steps=40)),
    Run("30-steps", "30 steps", Frame(steps=30)),
    Run("28-steps", "28 steps", Frame(steps=28), "tiny-28-9"),
    Run("shift-3", "shift 3", Frame(shift=3.0)),
    Run("192", "192×192, FLUX's shift for it", Frame(side=192, shift=round(shift_at(192), 3))),
)


def shipped(name: str) -> dict[str, Any]:
    """The setting that runs a schedule of the package."""
    from hasten.recipe import read_recipe

    path = SHIPPED / f"{name}.toml"
    return {"recipe": path.name, "toml": read_recipe(path).to_toml()}


def carried(frame: Frame, own_shift: float) -> tuple[list[int], bool]:
    """(the steps that the schedule computes in such a run, whether its fitted weights fill the
    others: they do on the noise levels that they were fitted on)."""
    from hasten.passes.cache.plan import schedule_plan
    from hasten.recipe import Recipe, ScheduleCache

    cache = Recipe.from_toml(shipped(SCHEDULE)["toml"]).cache
    assert isinstance(cache, ScheduleCache)
    shift = own_shift if frame.shift is None else frame.shift
    even = [1 - step / frame.steps for step in range(frame.steps)]
    plan = schedule_plan(cache, [*(shift * t / (1 + (shift - 1) * t) for t in even), 0.0])
    chosen = [step for step, runs in enumerate(plan.compute) if runs]
    fitted = {row for row, runs in zip(plan.weights, plan.compute, strict=True) if runs}
    return chosen, fitted != {(1.0,)}


def methods_for(run: Run) -> list[Method]:
    """The columns of a run, each with the settings that compute as many steps as the schedule;
    what was learned for the run itself only where that is another schedule."""

    def interval(predictor: str) -> Method:
        method = METHODS[f"interval, {predictor}"]
        return replace(
            method, settings=lambda count: interval_settings(count, predictor, run.frame.steps)
        )

    def schedule(column: str, name: str) -> Method:
        method = schedule_method([SHIPPED], "tiny", column)
        return replace(method, settings=lambda _: [shipped(name)])

    learned = [schedule(LEARNED, run.learned)] if run.learned else []
    carried = [schedule(CARRIED, SCHEDULE)] if run.learned != SCHEDULE else []
    others = [METHODS["fewer steps, Euler"], METHODS["fewer steps, UniPC"]]
    return [*learned, *carried, interval("reuse"), interval("linear"), *others]


def measured(run: Run, search: Sequence[Prompt], last: Sequence[Prompt]) -> Iterator[Row]:
    """Every column's best setting on `search`, scored on `last`."""
    model = Model("tiny", frame=run.frame)
    model.references([*search, *last], BATCH)
    compute, fitted = carried(run.frame, model.plain.scheduler.config.shift)
    for method in methods_for(run):
        bench = Bench(model, method, BATCH)
        offered = method.settings(len(compute))
        best = offered[0]
        if len(offered) > 1:
            best = min(offered, key=lambda one, bench=bench: bench.error(one, search))
        notes = run_notes(run)
        if best == shipped(SCHEDULE):
            notes.append(steps_note(compute, fitted))
        score = bench.score(best, last)
        yield scored_row(method.name, best, score, last, len(offered), notes)


def run_notes(run: Run) -> list[str]:
    """Notes on properties that the workload has no field for."""
    shift = run.frame.shift
    return [] if shift is None else [f"noise levels of shift {shift:g}"]


def steps_note(compute: Sequence[int], fitted: bool) -> str:
    """Which steps the schedule computes, and what fills the others."""
    filled = "its fitted weights fill" if fitted else "damped fills"
    return f"computes the steps {' '.join(map(str, compute))}; {filled} the others"


def folder_of(out: Path, run: Run) -> Path:
    return out / f"resampled-{run.key}"


def read_runs(out: Path) -> dict[str, Results]:
    """The available results, by the name of their run."""
    paths = {run.name: folder_of(out, run) / "results.json" for run in RUNS}
    return {name: read_results(path) for name, path in paths.items() if path.is_file()}


def markdown(runs: Mapping[str, Results]) -> str:
    """The results as tables: one line per run, mean LPIPS and, below, PSNR."""
    first = next(iter(runs.values()))
    device = first.environment.cpu or "a CPU"
    head = HEAD.format(schedule=SCHEDULE, source=first.workload.prompt_source, device=device)
    tables = [*_table(runs, "lpips"), "", "## PSNR", "", *_table(runs, "psnr"), ""]
    return "\n".join([head, *tables])


def _table(runs: Mapping[str, Results], measure: str) -> Iterator[str]:
    yield "| run | computed | " + " | ".join(title for _, title in COLUMNS) + " |"
    yield "|---|---:|" + "---:|" * len(COLUMNS)
    for name, results in runs.items():
        rows = {row.recipe: row for row in results.rows}
        count = _computed(rows.get(CARRIED) or rows[LEARNED])
        cells = [_cell(rows.get(column), measure, count) for column, _ in COLUMNS]
        yield f"| {name} | {count} of {results.workload.steps} | {' | '.join(cells)} |"


def _cell(row: Row | None, measure: str, expected: int) -> str:
    quality = row.quality_against(BASELINE) if row else None
    if row is None or quality is None:
        return "–"
    value = f"{lpips_of(row):.5f}" if measure == "lpips" else f"{quality.psnr:.1f}"
    count = _computed(row)
    return value if count == expected else f"{value} ({count})"


def _computed(row: Row) -> int:
    assert row.steps_computed is not None
    return round(row.steps_computed.mean)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--last", type=int, default=24, help="prompts to measure on")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    search, last = prompts(SEARCH, options.last)
    source = (
        f"The last {options.last} prompts of the bundled set, settings of the others searched on "
        f"the first {SEARCH}"
    )
    environment = detect_in_process("tiny", "cpu", "float32").environment
    environment = environment.model_copy(update={"threads": torch.get_num_threads()})
    there = read_runs(options.out)
    for run in RUNS:
        workload = workload_of("tiny", last, source, steps=run.frame.steps, side=run.frame.side)
        folder = folder_of(options.out, run)
        if run.name in there:
            if there[run.name].workload != workload:
                raise SystemExit(f"{folder} has another workload: name another --out")
            continue
        with torch.inference_mode():
            put(folder, workload, environment, [*measured(run, search, last)])
        write_report(folder / "results.json", folder)
        (options.out / "resampled.md").write_text(markdown(read_runs(options.out)), "utf-8")
        print(run.name, flush=True)


if __name__ == "__main__":
    main()
