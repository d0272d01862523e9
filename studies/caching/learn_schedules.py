"""Learn the schedules that ship, and those of the comparison's second model.

    python -m studies.caching.learn_schedules OUT [--device cuda] [--jobs 6] [--climb 4000]

Runs one process per model, number of steps and budget. Then it learns the generic plans from the
recorded runs of both models. Writes OUT/MODEL-STEPS-BUDGET.toml, OUT/generic-50-BUDGET.toml (and
generic-for-MODEL-50-BUDGET.toml, from the other model alone: what the comparison shows as generic)
and OUT/learned.json with the errors on held-back prompts. `tiny-*` and `generic-50-*` are what
src/hasten/schedules holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from studies.caching.workload import MODELS, SIZE, Model

import hasten
from hasten.calibration.learn import POWERS, SamplingRequest, sampling_request
from hasten.calibration.objective import relative_error
from hasten.calibration.search import GapCosts, best_path, gram_matrix
from hasten.calibration.store import CalibrationStore
from hasten.calibration.trajectories import Trajectories, record
from hasten.prompts import read_prompts
from hasten.recipe import Recipe, ScheduleCache

BUDGETS = {50: (25, 17, 13, 10), 28: (14, 9, 7, 6)}
WORK = [("tiny", 50), ("teacher", 50), ("tiny", 28)]
HELD_BACK = 16
BATCH = 32
GENERIC_STEPS = 50


def learn(name: str, steps: int, budget: int, options: argparse.Namespace) -> None:
    """Learn one schedule, and write its errors next to it."""
    model = Model(name, device=options.device)
    prompts = read_prompts("tiny", limit=options.prompts + HELD_BACK)
    found = hasten.calibrate(
        model.plain,
        prompts,
        budget=budget,
        steps=steps,
        climb=options.climb,
        objective=options.objective,
        held_back=HELD_BACK,
        batch=BATCH,
        state=options.out / f"state-{name}-{steps}-{budget}",
        **SIZE,
        **MODELS[name],
    )
    stem = f"{name}-{steps}-{budget}"
    recipe = found.recipe.but(name=stem)
    (options.out / f"{stem}.toml").write_text(recipe.to_toml(), "utf-8")
    told = {
        "model": name, "steps": steps, "budget": budget, "objective": options.objective,
        "error": found.error, "interval_error": found.interval_error,
        "lpips": found.lpips, "interval_lpips": found.interval_lpips,
        "interval": found.interval.model_dump(), "order": len(recipe.cache.weights[-1]),
        "learned_on": options.prompts, "held_back": HELD_BACK,
    }  # fmt: skip
    (options.out / f"{stem}.json").write_text(json.dumps(told), "utf-8")


@dataclass(frozen=True)
class Recorded:
    """A model, and its full runs of the first prompts."""

    request: SamplingRequest
    runs: Trajectories

    def error(self, plan: ScheduleCache) -> float:
        """Relative error of the final latents of running the plan on these prompts."""
        fast = hasten.optimize(self.request.pipe, Recipe(cache=plan))
        try:
            finals = self.request.run_all(fast, range(self.runs.velocities.shape[1]))
        finally:
            fast.restore()
        return relative_error(self.runs.latents[-1])(finals)


def generic(models: dict[str, Recorded], budget: int, prefix: str) -> Recipe:
    """A plan for any FLUX-like model: of a few searched ones, the best for all these models.

    Each model's Gram matrix is divided by its trace, so that no model counts more for its scale.
    Nothing is fitted: the cost is that of the predictor which then fills the gaps.
    """
    grams = [gram_matrix(model.runs) for model in models.values()]
    together = sum(gram / np.trace(gram) for gram in grams)
    sigmas = next(iter(models.values())).runs.sigmas
    plans = [
        ScheduleCache(
            steps=GENERIC_STEPS,
            compute=best_path(GapCosts(together, sigmas, name), GENERIC_STEPS, budget, power),
            predictor=name,
            sigmas=tuple(round(sigma, 6) for sigma in sigmas[:-1]),
            calibrated=False,
        )
        for name, power in product(("linear", "damped"), POWERS)
    ]
    best = min(plans, key=lambda plan: sum(model.error(plan) for model in models.values()))
    return Recipe(
        name=f"{prefix}-{GENERIC_STEPS}-{budget}",
        description=f"learned on {' and '.join(models)}, not on your model",
        cache=best,
    )


@torch.no_grad()
def write_generic(options: argparse.Namespace) -> None:
    """Plans from all models and, to evaluate such plans, for each model from the others."""
    models = {name: recorded(name, options) for name in MODELS}
    for budget in BUDGETS[GENERIC_STEPS]:
        plans = [generic(models, budget, "generic")]
        for name in models:
            others = {other: models[other] for other in models if other != name}
            plans.append(generic(others, budget, f"generic-for-{name}"))
        for recipe in plans:
            (options.out / f"{recipe.name}.toml").write_text(recipe.to_toml(), "utf-8")


def recorded(name: str, options: argparse.Namespace) -> Recorded:
    """Full runs of the first prompts, kept in OUT/runs-NAME."""
    model = Model(name, device=options.device)
    prompts = read_prompts("tiny", limit=options.prompts)
    asked = {**SIZE, **MODELS[name]}
    request = sampling_request(model.plain, prompts, GENERIC_STEPS, 0, BATCH, asked)
    runs = record(
        lambda ids: request.run(request.pipe, ids),
        request.pipe,
        request.batches(range(len(prompts))),
        lambda done, total: None,
        CalibrationStore(options.out / f"runs-{name}", request.key()),
    )
    return Recorded(request, runs)


def main() -> None:
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.generic:
        write_generic(options)
        return
    if options.one:
        name, steps, budget = options.one
        learn(name, int(steps), int(budget), options)
        return
    jobs = [(name, str(steps), str(k)) for name, steps in WORK for k in BUDGETS[steps]]

    def run(job: tuple[str, ...]) -> int:
        command = [sys.executable, "-m", "studies.caching.learn_schedules", *sys.argv[1:]]
        log = options.out / f"{'-'.join(job)}.log"
        with log.open("w") as output:
            return subprocess.run(
                [*command, "--one", *job],
                env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
                stdout=output,
                stderr=output,
                check=False,
            ).returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [job for job, code in zip(jobs, pool.map(run, jobs), strict=True) if code]
    write_generic(options)
    told = [json.loads(p.read_text()) for p in sorted(options.out.glob("t*-*-*.json"))]
    (options.out / "learned.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    for row in told:
        print("{model}-{steps}-{budget}: {error:.4f} {interval_error:.4f}, ".format(**row), end="")
        print("LPIPS {lpips:.5f} {interval_lpips:.5f}, order {order}".format(**row))
    if failed:
        raise SystemExit(f"failed: {failed}; see the logs in {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--climb", type=int, default=4000)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--objective", choices=("latent", "lpips"), default="latent")
    parser.add_argument("--generic", action="store_true", help="only the generic plans")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
