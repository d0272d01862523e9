"""Compare step caches at equal cost; each job runs in a separate process.

    python -m studies.caching.run                          # all methods on the bundled model
    python -m studies.caching.run --device cuda --model tiny teacher --jobs 10 --deadline 420
    python -m studies.caching.run --methods "MagCache" "TaylorSeer"
    python -m studies.caching.run --recipes learned/       # MODEL-50-*.toml as row `schedule`
    python -m studies.caching.run --recipes a.toml b.toml  # rows of your own
    python -m studies.caching.run --stored --last 200      # known settings on more prompts
    python -m studies.caching.run --blocks 57              # as in a model as deep as FLUX.1-dev
    python -m studies.caching.run --plan                   # print the jobs, run nothing

Rows are added to (or replaced in) RESULTS/MODEL-BUDGET/results.json as their jobs finish; reports,
table and plot follow.
The exit status is 1 if a job failed or the deadline passed; finished results have been written.
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
from importlib import metadata
from pathlib import Path
from typing import Any

from studies.caching.figure import lpips_of, write_figure
from studies.caching.jobs import (
    GENERIC,
    REFERENCES,
    SCHEDULE,
    Job,
    in_order,
    jobs_for,
    name_of,
)
from studies.caching.launch import Launcher
from studies.caching.methods import METHODS
from studies.caching.pool import run_all
from studies.caching.results import folder_of, put, setting_of, workload_of
from studies.caching.workload import prompts

from hasten.benchmark.environment import detect_in_process
from hasten.report import write_report
from hasten.results import Environment, Results, Row, Workload
from hasten.results_file import read_results

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
    _check_workloads(options)
    jobs = in_order(_jobs(options))
    if options.plan:
        print("\n".join(_planned(jobs)))
        return
    missing = _run(jobs, options)
    for model in options.model:
        for path in [_folder(options, model, budget) for budget in options.budgets]:
            write_report(path / "results.json", path)
        if not options.blocks:
            write_figure(options.results, model)
    print(f"{len(jobs)} jobs, {time.time() - begun:.0f} s", flush=True)
    if missing:
        raise SystemExit("\n".join(["missing:", *missing]))


def _folder(options: argparse.Namespace, model: str, budget: float) -> Path:
    return folder_of(options.results, model, budget, options.blocks)


def _known(options: argparse.Namespace, model: str) -> dict[float, Results]:
    """The available results of the model, by budget."""
    paths = {one: _folder(options, model, one) / "results.json" for one in options.budgets}
    return {budget: read_results(path) for budget, path in paths.items() if path.is_file()}


def _workload(options: argparse.Namespace, model: str) -> Workload:
    source = (
        f"bundled set tiny: settings searched on the first {options.search}, "
        f"measured on the last {options.last}"
    )
    return workload_of(model, prompts(options.search, options.last)[1], source)


def _check_workloads(options: argparse.Namespace) -> None:
    """Rows of different prompts do not go into one file."""
    for model in options.model:
        for budget, results in _known(options, model).items():
            if results.workload != _workload(options, model):
                place = _folder(options, model, budget)
                raise SystemExit(f"{place} has another workload: name other --results")


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    files = [str(path.resolve()) for path in options.recipes if path.is_file()]
    folders = [str(path.resolve()) for path in options.recipes if not path.is_file()]
    every = PARTIAL if options.blocks else EVERY
    for model in options.model:
        known = _known(options, model) if options.stored else {}
        for name in options.methods or files or every:
            whole = Job(
                model=model,
                method=name,
                budgets=options.budgets,
                search=options.search,
                last=options.last,
                device=options.device,
                batch=options.batch,
                blocks=options.blocks,
                recipes=[*folders, str(LEARNED), str(SHIPPED)],
            )
            settings = _settings(known, name_of(whole))
            yield from jobs_for(replace(whole, stored=settings or None))


def _settings(known: dict[float, Results], name: str) -> dict[str, dict[str, Any]]:
    """A row's settings found so far, by budget."""
    rows = {budget: row for budget, one in known.items() for row in one.rows if row.recipe == name}
    return {str(budget): found for budget, row in rows.items() if (found := setting_of(row))}


def _run(jobs: Sequence[Job], options: argparse.Namespace) -> list[str]:
    """Run all jobs, the models' full runs before the others; return a line for each one lost."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to look for a GPU must not start CUDA
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["studies.caching.preload"])
    multiprocessing.forkserver.ensure_running()  # it imports while we look around
    device, environment = _surroundings(options)
    place = environment.gpu or environment.cpu
    jobs = [replace(job, device=device, notes=[f"measured on {place}"]) for job in jobs]
    full = [replace(jobs[0], model=model, method=REFERENCES) for model in options.model]
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(processes, Path(folder))
        for job, code, stopped in run_all(full, options.jobs, launcher.start, options.end):
            missing += [f"{job.model}: {job.method}: {stopped or code}"] if stopped or code else []
        for ended in run_all(jobs, options.jobs, launcher.start, options.end):
            rows, lost = launcher.rows(ended)
            model = ended.task.model
            for budget, row in rows.items():
                workload = _workload(options, model)
                put(_folder(options, model, budget), workload, environment, [row])
                print(f"{model}, {budget}: {_brief(row)}", flush=True)
            missing += [f"{model}: {name_of(ended.task)}: {lost}"] if lost else []
    return missing


def _surroundings(options: argparse.Namespace) -> tuple[str, Environment]:
    """(the device that `auto` or `cuda` means, where it is measured)."""
    here = detect_in_process("tiny", options.device, "float32")
    if here.fault:
        raise SystemExit(f"{here.fault}: {here.fix}")
    packages = {"cache-dit": metadata.version("cache-dit")} if _installed("cache-dit") else {}
    update = {"threads": options.threads, "packages": packages}
    return here.device, here.environment.model_copy(update=update)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _planned(jobs: Sequence[Job]) -> Iterator[str]:
    """One line per job, in the order in which they would begin."""
    for job in jobs:
        budgets = " ".join(f"{budget:g}" for budget in job.budgets)
        yield f"{job.model:8} {name_of(job)} ({budgets})"


def _brief(row: Row) -> str:
    if row.status != "ok":
        return f"{row.recipe}: {row.reason}"
    return f"{row.recipe}: {row.extra['evaluations']:.1f} evaluations, LPIPS {lpips_of(row):.4f}"


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
    parser.add_argument("--blocks", type=int, help="charge early leavers as in so deep a model")
    parser.add_argument("--plan", action="store_true", help="print the jobs, run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
