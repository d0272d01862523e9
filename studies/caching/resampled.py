"""A learned schedule away from where it was learned: other steps, other noise levels, other sizes.

    python -m studies.caching.resampled [--last 24] [--out FILE.json]
    python -m studies.caching.resampled --report FILE.json      # the table once more

The bundled model's schedule for 17 of 50 steps, against caches and fewer steps that compute as
many steps in the same run; each against the full run under the same settings. Settings of the
others are searched for every run anew, the schedule is taken as it ships. A few minutes on two
cores; writes FILE.json and, beside it, FILE.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from studies.caching.methods import METHODS, Method, interval_settings, schedule_method
from studies.caching.row import Bench, point_of
from studies.caching.run import RESULTS, SHIPPED
from studies.caching.workload import Frame, Model, Prompt, prompts

__all__ = ["RUNS", "Run", "carried", "markdown", "methods_for"]

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

{prompts}, float32,
{device}. Mean LPIPS, and below dB of PSNR, against the full run under the same settings. All
columns of a line compute as many steps, unless a number in brackets says how many.
"""


@dataclass(frozen=True)
class Run:
    """A kind of full run, and the schedule that ships for just that, if there is one."""

    name: str
    frame: Frame
    learned: str | None = None


def shift_at(side: int) -> float:
    """The shift that FLUX.1-dev's rule gives for a square picture: e to a power linear in the
    number of its tokens (0.5 at 256, 1.15 at 4096)."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return float(torch.tensor(calculate_shift((side // 16) ** 2)).exp())


RUNS = (
    Run("as learned: 50 steps, 128×128, shift 1.5", Frame(), SCHEDULE),
    Run("40 steps", Frame(steps=40)),
    Run("30 steps", Frame(steps=30)),
    Run("28 steps", Frame(steps=28), "tiny-28-9"),
    Run("shift 3", Frame(shift=3.0)),
    Run("192×192, FLUX's shift for it", Frame(side=192, shift=round(shift_at(192), 3))),
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


def measured(run: Run, search: Sequence[Prompt], last: Sequence[Prompt]) -> dict[str, Any]:
    """A run's row: every column's best setting on `search`, scored on `last`."""
    started = time.monotonic()
    model = Model("tiny", frame=run.frame)
    model.references([*search, *last], BATCH)
    compute, fitted = carried(run.frame, model.plain.scheduler.config.shift)
    points = {}
    for method in methods_for(run):
        bench = Bench(model, method, BATCH)
        offered = method.settings(len(compute))
        best = offered[0]
        if len(offered) > 1:
            best = min(offered, key=lambda one, bench=bench: bench.error(one, search))
        point = point_of(None, best, bench.score(best, last)) | {"tried": len(offered)}
        del point["budget"]
        point["setting"] = {k: v for k, v in best.items() if k != "toml"}
        points[method.name] = point
    seconds = round(time.monotonic() - started, 1)
    about = {"name": run.name, **asdict(run.frame), "learned": run.learned}
    return {**about, "compute": compute, "fitted": fitted, "seconds": seconds, "points": points}


def markdown(results: dict[str, Any]) -> str:
    """The results as tables: a line a run, mean LPIPS and, below, PSNR."""
    head = HEAD.format(
        schedule=results["schedule"],
        prompts=results["workload"]["prompts"],
        device=results["environment"].get("cpu", "a CPU"),
    )
    return "\n".join([head, *_table(results, "lpips"), "", "## PSNR", "", *_table(results, "psnr")])


def _table(results: dict[str, Any], measure: str) -> Iterator[str]:
    yield "| run | computed | " + " | ".join(title for _, title in COLUMNS) + " |"
    yield "|---|---:|" + "---:|" * len(COLUMNS)
    for run in results["runs"]:
        cells = [_cell(run, name, measure) for name, _ in COLUMNS]
        yield f"| {run['name']} | {len(run['compute'])} of {run['steps']} | {' | '.join(cells)} |"


def _cell(run: dict[str, Any], name: str, measure: str) -> str:
    point = run["points"].get(name)
    if point is None:
        return "–"
    value = f"{point[measure]:.5f}" if measure == "lpips" else f"{point[measure]:.1f}"
    count = round(point["computed"])
    return value if count == len(run["compute"]) else f"{value} ({count})"


def write(results: dict[str, Any], path: Path) -> None:
    """The results and, beside them, their table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(markdown(results) + "\n", "utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--last", type=int, default=24, help="prompts to measure on")
    parser.add_argument("--out", type=Path, default=RESULTS / "resampled.json")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only write its table anew")
    parser.add_argument("--resume", action="store_true", help="keep the runs that FILE has")
    options = parser.parse_args(arguments)
    if options.report:
        write(json.loads(options.report.read_text("utf-8")), options.report)
        return
    results = _about(options.last)
    if options.resume:
        results = _begun(options.out, results["workload"])
    done = {run["name"] for run in results["runs"]}
    search, last = prompts(SEARCH, options.last)
    with torch.inference_mode():
        for run in (run for run in RUNS if run.name not in done):
            results["runs"].append(measured(run, search, last))
            write(results, options.out)
            print(f"{run.name}: {results['runs'][-1]['seconds']} s", flush=True)


def _begun(path: Path, workload: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier start of the same workload."""
    begun: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if begun["workload"] != workload:
        raise SystemExit(f"{path} has another workload ({begun['workload']}): start without it")
    return begun


def _about(last: int) -> dict[str, Any]:
    from hasten.benchmark.environment import look_in_process

    environment = look_in_process("cpu", "float32").environment.model_dump(exclude_none=True)
    environment["threads"] = torch.get_num_threads()
    return {
        "schema": 1,
        "schedule": SCHEDULE,
        "workload": {
            "model": "tiny",
            "dtype": "float32",
            "prompts": f"The last {last} prompts of the bundled set, settings of the others "
            f"searched on the first {SEARCH}",
            "seeds": "the prompt's number in the set",
        },
        "environment": environment,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [],
    }


if __name__ == "__main__":
    main()
