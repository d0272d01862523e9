"""Compare step caches at equal cost; each method in a process of its own.

    python -m benchmarks.caching.run                          # all methods on the bundled model
    python -m benchmarks.caching.run --model teacher --methods "MagCache" "TaylorSeer"
    python -m benchmarks.caching.run --recipes a.toml b.toml  # rows of your own
    python -m benchmarks.caching.run --stored --last 200      # known settings on more prompts
    python -m benchmarks.caching.run --time                   # their wall time, on an idle machine
    python -m benchmarks.caching.run --blocks 57              # as in a model as deep as FLUX.1-dev

Rows are added to (or replaced in) RESULTS/MODEL.json as they finish; the report follows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.caching.methods import METHODS
from benchmarks.caching.report import write_report
from benchmarks.caching.row import Job

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "caching"
LOGS = ROOT / "out" / "caching" / "logs"
PARTIAL = ["FirstBlockCache", "DBCache", "DBCache + TaylorSeer", "step masks"]
"""Methods that run the first block on a skipped step: 1/11 of this model, 1/57 of FLUX.1-dev."""


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    path = options.results / f"{options.model}.json"
    results = json.loads(path.read_text("utf-8")) if path.is_file() else {"schema": 1, "rows": []}
    every = PARTIAL if options.blocks else [*METHODS]
    names = [str(path.resolve()) for path in options.recipes] or options.methods or every
    if options.time and not options.recipes:
        names = [name for name in names if _settings(results, name, options.blocks)]
    failed: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(_row, _job(name, options, results), options): name for name in names}
        for done in as_completed(running):
            if done.exception():
                failed.append(str(done.exception()))
                print(failed[-1], flush=True)
                continue
            row = done.result()
            merge(results, row, timed=options.time)
            results |= _surroundings(options)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            brief = row["reason"] or "; ".join(map(_brief, row["points"]))
            print(f"{row['method']}: {brief}", flush=True)
    write_report(path)
    if failed:
        raise SystemExit(1)


def merge(results: dict[str, Any], row: dict[str, Any], *, timed: bool) -> None:
    """Put a row in place of an older one of its method; a timed row only adds its seconds."""
    rows = results["rows"]
    place = next((i for i, old in enumerate(rows) if _key(old) == _key(row)), len(rows))
    if not timed:
        rows[place : place + 1] = [row]
        return
    for timing in row["points"]:
        for point in rows[place]["points"]:
            if str(point["budget"]) == timing["budget"]:
                point |= {name: timing[name] for name in ("seconds", "plain_seconds")}


def _key(row: dict[str, Any]) -> tuple[str, int | None]:
    return row["method"], row.get("blocks")


def _job(name: str, options: argparse.Namespace, results: dict[str, Any]) -> Job:
    known = _settings(results, name, options.blocks) if options.stored or options.time else None
    return Job(
        model=options.model,
        method=name,
        budgets=options.budgets,
        search=options.search,
        last=options.last,
        batch=options.batch,
        stored=known or None,
        timed=options.time,
        blocks=options.blocks,
    )


def _settings(results: dict[str, Any], name: str, blocks: int | None) -> dict[str, Any]:
    """Settings found so far for a method, by budget."""
    key = name if name in METHODS else f"recipe:{Path(name).name}", blocks
    points = [point for row in results["rows"] if _key(row) == key for point in row["points"]]
    return {str(point["budget"]): point["setting"] for point in points if point.get("setting")}


def _row(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{job.model}-{Path(job.method).name}-{job.blocks or 'own'}.log"
    with tempfile.TemporaryDirectory() as folder, log.open("w") as output:
        job_file, row_file = Path(folder, "job.json"), Path(folder, "row.json")
        job_file.write_text(json.dumps(asdict(job)), "utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.caching.row", job_file, row_file],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
            stdout=output,
            stderr=output,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{job.method} failed; see {log}")
        row: dict[str, Any] = json.loads(row_file.read_text("utf-8"))
        return row


def _surroundings(options: argparse.Namespace) -> dict[str, Any]:
    from hasten.benchmark.environment import look_in_process

    environment = look_in_process("cpu", "float32").environment.model_dump(exclude_none=True)
    environment["packages"] = {
        name: metadata.version(name)
        for name in ("torch", "diffusers", "transformers", "cache-dit")
        if _installed(name)
    }
    return {
        "model": options.model,
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


def _brief(point: dict[str, Any]) -> str:
    if point.get("lpips") is None:
        return f"{point['budget']}: {point.get('reason') or point.get('seconds')}"
    return f"{point['budget']}: {point['evaluations']:.1f} evaluations, LPIPS {point['lpips']:.4f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("tiny", "teacher"), default="tiny")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], metavar="METHOD")
    parser.add_argument("--recipes", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--budgets", nargs="+", type=int, default=[25, 17, 13, 10])
    parser.add_argument("--search", type=int, default=4, help="prompts to search settings on")
    parser.add_argument("--last", type=int, default=100, help="prompts to measure on")
    parser.add_argument("--batch", type=int, default=4, help="images at a time, where that is fair")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--stored", action="store_true", help="known settings, no search")
    parser.add_argument("--time", action="store_true", help="only time the known settings")
    parser.add_argument("--blocks", type=int, help="charge early leavers as in so deep a model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
