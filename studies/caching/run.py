"""Compare step caches at equal cost; each job in a process of its own.

    python -m studies.caching.run                          # all methods on the bundled model
    python -m studies.caching.run --device cuda --model tiny teacher --jobs 10 --deadline 420
    python -m studies.caching.run --methods "MagCache" "TaylorSeer"
    python -m studies.caching.run --recipes learned/       # MODEL-50-*.toml as row `schedule`
    python -m studies.caching.run --recipes a.toml b.toml  # rows of your own
    python -m studies.caching.run --stored --last 200      # known settings on more prompts
    python -m studies.caching.run --time                   # their wall time, on an idle machine
    python -m studies.caching.run --blocks 57              # as in a model as deep as FLUX.1-dev
    python -m studies.caching.run --plan                   # print the jobs, run nothing

Rows are added to (or replaced in) RESULTS/MODEL.json as their jobs finish; the report follows.
Exit status 1 where a job failed or the deadline came first; what there is has been written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from studies.caching.jobs import GENERIC, REFERENCES, SCHEDULE, Job, in_order, jobs_for, seconds
from studies.caching.launch import Launcher
from studies.caching.methods import METHODS
from studies.caching.pool import run_all
from studies.caching.report import write_report
from studies.caching.results import Results, settings_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "studies" / "results" / "caching"
SHIPPED = ROOT / "src" / "hasten" / "schedules"
LEARNED = ROOT / "studies" / "caching" / "schedules"
EVERY = [SCHEDULE, GENERIC, *METHODS]
PARTIAL = ["residual", "FirstBlockCache", "DBCache", "DBCache + TaylorSeer", "step masks"]
"""Methods that run the first block on a skipped step: 1/11 of this model, 1/57 of FLUX.1-dev."""


def main(arguments: list[str] | None = None) -> None:
    begun = time.time()
    options = _parser().parse_args(arguments)
    options.end = begun + options.deadline if options.deadline else None
    results = {
        name: Results(options.results / f"{name}.json", timed=options.time)
        for name in options.model
    }
    jobs = in_order(_jobs(options, results), options.model)
    if options.plan:
        print("\n".join(_planned(jobs)))
        return
    missing = _run(jobs, options, results)
    for one in results.values():
        try:
            write_report(one.path)
        except (ImportError, OSError) as error:  # the results are there, and can be drawn elsewhere
            print(f"no report of {one.path}: {error}", flush=True)
    print(f"{len(jobs)} jobs, {time.time() - begun:.0f} s", flush=True)
    if missing:
        raise SystemExit("\n".join(["missing:", *missing]))


def _jobs(options: argparse.Namespace, results: dict[str, Results]) -> Iterator[Job]:
    files = [str(path.resolve()) for path in options.recipes if path.is_file()]
    folders = [str(path.resolve()) for path in options.recipes if not path.is_file()]
    every = PARTIAL if options.blocks else EVERY
    for model in options.model:
        for name in options.methods or files or every:
            known = None
            if options.stored or options.time:
                known = settings_of(results[model].data, name, options.blocks)
                if options.time and not known:
                    continue
            whole = Job(
                model=model,
                method=name,
                budgets=options.budgets,
                search=options.search,
                last=options.last,
                device=options.device,
                batch=options.batch,
                stored=known or None,
                timed=options.time,
                blocks=options.blocks,
                recipes=[*folders, str(LEARNED), str(SHIPPED)],
            )
            yield from jobs_for(whole)


def _run(
    jobs: Sequence[Job], options: argparse.Namespace, results: dict[str, Results]
) -> list[str]:
    """Run all jobs, the models' full runs before the others; return a line for each one lost."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to look for a GPU must not start CUDA
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["studies.caching.preload"])
    multiprocessing.forkserver.ensure_running()  # it imports while we look around
    device, about = _surroundings(options)
    jobs = [replace(job, device=device) for job in jobs]
    full = [replace(jobs[0], model=model, method=REFERENCES) for model in options.model]
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(processes, Path(folder), options.jobs, options.end)
        for job, code, stopped in run_all(full, options.jobs, launcher.start, options.end):
            missing += [f"{job.model}: {job.method}: {stopped or code}"] if stopped or code else []
        for ended in run_all(jobs, options.jobs, launcher.start, options.end):
            part, lost = launcher.part(ended)
            results[ended.task.model].add(part, {"model": ended.task.model, **about})
            missing += [f"{ended.task.model}: {part['method']}: {lost}"] if lost else []
            print(f"{ended.task.model}: {_brief(part)}", flush=True)
    return missing


def _surroundings(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """(the device that `auto` or `cuda` means, what a results file says besides its rows)."""
    from hasten.benchmark.environment import look_in_process

    here = look_in_process(options.device, "float32")
    if here.fault:
        raise SystemExit(f"{here.fault}: {here.fix}")
    environment = here.environment.model_dump(exclude_none=True)
    environment["threads"] = options.threads
    environment["packages"] = {
        name: metadata.version(name)
        for name in ("torch", "diffusers", "transformers", "cache-dit")
        if _installed(name)
    }
    return here.device, {
        "workload": {
            "steps": 50,
            "size": "128x128",
            "dtype": "float32",
            "prompts": f"bundled set tiny: settings searched on the first {options.search}, "
            f"measured on the last {options.last}",
            "seeds": "the prompt's number in the set",
        },
        "budgets": options.budgets,
        "environment": environment,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _planned(jobs: Sequence[Job]) -> Iterator[str]:
    """A line a job, in the order in which they would begin, and the guess of their times."""
    for job in jobs:
        budgets = " ".join(f"{budget:g}" for budget in job.budgets)
        yield f"{seconds(job):6.1f} s  {job.model:8} {job.method} ({budgets})"
    yield f"{sum(map(seconds, jobs)):6.1f} s  {len(jobs)} jobs, each alone on an H100: a guess"


def _brief(part: dict[str, Any]) -> str:
    points = "; ".join(map(_brief_point, part["points"]))
    return f"{part['method']}: {part['reason'] or points} ({part.get('seconds', 0):.0f} s)"


def _brief_point(point: dict[str, Any]) -> str:
    if point.get("lpips") is None:
        return f"{point['budget']}: {point.get('reason') or point.get('seconds')}"
    return f"{point['budget']}: {point['evaluations']:.1f} evaluations, LPIPS {point['lpips']:.4f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", nargs="+", choices=("tiny", "teacher"), default=["tiny"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--methods", nargs="+", choices=EVERY, metavar="METHOD")
    parser.add_argument("--recipes", nargs="+", type=Path, default=[], metavar="FILE|FOLDER")
    parser.add_argument("--budgets", nargs="+", type=int, default=[25, 17, 13, 10])
    parser.add_argument("--search", type=int, default=4, help="prompts to search settings on")
    parser.add_argument("--last", type=int, default=100, help="prompts to measure on")
    parser.add_argument("--batch", type=int, help="images at a time, where that is fair")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="end by then")
    parser.add_argument("--stored", action="store_true", help="known settings, no search")
    parser.add_argument("--time", action="store_true", help="only time the known settings")
    parser.add_argument("--blocks", type=int, help="charge early leavers as in so deep a model")
    parser.add_argument("--plan", action="store_true", help="print the jobs, run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
