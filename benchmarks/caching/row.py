"""One method in a process of its own: search its settings, then measure the best of each budget.

python -m benchmarks.caching.row JOB.json ROW.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.caching.methods import METHODS, Method, UnsupportedError, recipe_method
from benchmarks.caching.search import gentlest, geometric, halve
from benchmarks.caching.workload import Model, Prompt, prompts

from hasten.quality import lpips, psnr, ssim

__all__ = ["Job", "limit_of", "run_row"]

STEPS = 50
TOLERANCE = 1.02
KNOB_VALUES = 48
STAGES = ((2, 4), (4, 1))
TIMED_PROMPTS = 5
RETRIES = 4

Setting = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What to do for one row.

    stored: a setting found before for each budget: no search then; blocks: charge a call that
    leaves early as in a model of so many blocks.
    """

    model: str
    method: str
    budgets: list[float]
    search: int
    last: int
    batch: int
    stored: dict[str, Setting] | None = None
    timed: bool = False
    blocks: int | None = None


def limit_of(budget: float) -> float:
    """The most evaluations a setting may cost and still count for this budget."""
    return budget * TOLERANCE


@dataclass(frozen=True)
class Score:
    """Per prompt: distance and likeness to the reference, and cost."""

    lpips: list[float]
    ssim: list[float]
    psnr: list[float]
    evaluations: list[float]
    computed: list[float]


class Bench:
    """Applies settings of one method to fresh pipelines and scores what they draw."""

    def __init__(self, model: Model, method: Method, batch: int) -> None:
        self.model = model
        self.method = method
        self.batch = 1 if method.single else batch
        self.known: dict[tuple[str, int], Score] = {}

    def score(self, setting: Setting, chosen: Sequence[Prompt]) -> Score:
        """Render `chosen` under `setting` and compare with the plain pipeline's full runs."""
        own = dict(setting)
        steps = own.get("steps", STEPS)
        call = self.method.apply(self.model.pipeline(), own)
        drawn = self.model.render(call, chosen, steps=steps, batch=self.batch)
        if not drawn.images.isfinite().all():  # some solver options divide by zero here
            worst = [math.inf] * len(chosen)
            return Score(worst, worst, worst, drawn.evaluations, drawn.computed)
        reference = self.model.references(chosen)
        return Score(
            lpips(drawn.images, reference).tolist(),
            ssim(drawn.images, reference).tolist(),
            psnr(drawn.images, reference).tolist(),
            drawn.evaluations,
            drawn.computed,
        )

    def trial(self, setting: Setting, chosen: Sequence[Prompt]) -> Score:
        """`score`, remembered: searches come back to the same settings."""
        key = (json.dumps(setting, sort_keys=True), len(chosen))
        if key not in self.known:
            self.known[key] = self.score(setting, chosen)
        return self.known[key]

    def error(self, setting: Setting, chosen: Sequence[Prompt]) -> float:
        return statistics.mean(self.trial(setting, chosen).lpips)

    def cost(self, setting: Setting, chosen: Sequence[Prompt]) -> float:
        return statistics.mean(self.trial(setting, chosen).evaluations)


def run_row(job: Job) -> dict[str, Any]:
    """The row: points, or the reason why there are none."""
    started = time.monotonic()
    method = recipe_method(Path(job.method)) if job.method not in METHODS else METHODS[job.method]
    row: dict[str, Any] = {"method": method.name, "package": method.package, "note": method.note}
    row["blocks"] = job.blocks
    model = Model(job.model, job.blocks)
    bench = Bench(model, method, job.batch)
    search, measured = prompts(job.search, job.last)
    try:
        model.references(search)
        model.references(measured)
        if job.timed:
            row["points"] = _timed(bench, job, measured)
        elif job.method not in METHODS:
            row["points"] = [_point(None, method.settings(0)[0], bench, measured)]
        else:
            row["points"] = [*_points(bench, job, search, measured)]
    except UnsupportedError as error:
        return {**row, "points": [], "reason": str(error)}
    return {**row, "reason": None, "seconds": round(time.monotonic() - started)}


def _points(bench: Bench, job: Job, search: Sequence[Prompt], measured: Sequence[Prompt]) -> Any:
    found: Any = _Stored(job.stored) if job.stored else _finder(bench, search)
    for budget in job.budgets:
        target = limit_of(budget)
        for _ in range(RETRIES):
            setting, tried = found.best(budget, target)
            if setting is None:
                yield {"budget": budget, "setting": None, "reason": tried}
                break
            point = _point(budget, setting, bench, measured)
            if point["evaluations"] <= limit_of(budget):
                yield {**point, "tried": tried}
                break
            if job.stored:
                yield {**point, "tried": tried, "reason": "over budget on these prompts"}
                break
            target *= 0.998 * limit_of(budget) / point["evaluations"]
        else:
            yield {"budget": budget, "setting": None, "reason": "no setting stayed within budget"}
        print(f"{bench.method.name}: budget {budget} done", file=sys.stderr, flush=True)


def _point(
    budget: float | None, setting: Setting, bench: Bench, measured: Sequence[Prompt]
) -> dict[str, Any]:
    score = bench.score(setting, measured)
    means = {name: statistics.mean(values) for name, values in asdict(score).items()}
    per_prompt = {
        name: [round(value, 6) for value in values] for name, values in asdict(score).items()
    }
    if len(set(per_prompt["evaluations"])) == 1:  # a static plan
        del per_prompt["evaluations"], per_prompt["computed"]
    point = {"budget": budget, "setting": setting, **means, "n": len(measured)}
    return {**point, "per_prompt": per_prompt}


class _Stored:
    """Settings found by an earlier run."""

    def __init__(self, settings: dict[str, Setting]) -> None:
        self.settings = settings

    def best(self, budget: float, target: float) -> tuple[Setting | None, Any]:
        setting = self.settings.get(str(budget))
        return (setting, 0) if setting else (None, "no setting was found within this budget")


class _ListFinder:
    """Judges each candidate with the number of computed steps that the budget pays for."""

    def __init__(self, bench: Bench, search: Sequence[Prompt]) -> None:
        self.bench = bench
        self.search = search
        half = STEPS // 2
        probe = bench.cost(bench.method.settings(half)[0], search[:1])
        self.skip = max(0.0, (probe - half) / (STEPS - half))

    def best(self, budget: float, target: float) -> tuple[Setting | None, Any]:
        computed = math.floor((target - STEPS * self.skip) / (1 - self.skip) + 1e-6)
        for fewer in range(max(computed, 0), 0, -1):
            candidates = self.bench.method.settings(fewer)
            first = self.search[:1]
            if candidates and self.bench.cost(candidates[0], first) <= target:
                best = halve(candidates, self._error, STAGES)
                return best, len(candidates)
        return None, f"a skipped step still costs {self.skip:.3f} evaluations"

    def _error(self, setting: Setting, count: int) -> float:
        return self.bench.error(setting, self.search[:count])


class _KnobFinder:
    """For each combination of the other options, the gentlest threshold within the budget."""

    def __init__(self, bench: Bench, search: Sequence[Prompt]) -> None:
        self.bench = bench
        self.search = search
        knob = bench.method.knob
        assert knob is not None
        self.knob = knob
        self.values = geometric(knob.low, knob.high, KNOB_VALUES)
        self.extra: Setting = {}
        if bench.method.calibrate:
            self.extra = bench.method.calibrate(bench.model.pipeline(), self._run)

    def best(self, budget: float, target: float) -> tuple[Setting | None, Any]:
        judged = self.search[:1] if self.knob.static else self.search
        fitting = []
        for other in self.bench.method.settings(0):
            settings = [self._with({**other, **self.extra}, value) for value in self.values]
            setting = gentlest(settings, target, lambda one: self.bench.cost(one, judged))
            if setting is not None:
                fitting.append(setting)
        if not fitting:
            return None, "no threshold comes down to this budget"
        best = min(fitting, key=lambda setting: self.bench.error(setting, self.search))
        return best, len(self.bench.known)

    def _with(self, other: Setting, value: float) -> Setting:
        return {**other, self.knob.name: float(f"{value:.4g}")}

    def _run(self, pipe: Any) -> None:
        self.bench.model.render(pipe, self.search, batch=len(self.search))


def _finder(bench: Bench, search: Sequence[Prompt]) -> _ListFinder | _KnobFinder:
    return _KnobFinder(bench, search) if bench.method.knob else _ListFinder(bench, search)


def _timed(bench: Bench, job: Job, measured: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Median seconds an image, one at a time, beside the plain pipeline's on the same prompts."""
    plain = _median_seconds(bench, bench.model.pipeline(), STEPS, measured)
    points = []
    for budget, setting in (job.stored or {}).items():
        call = bench.method.apply(bench.model.pipeline(), dict(setting))
        seconds = _median_seconds(bench, call, setting.get("steps", STEPS), measured)
        points.append({"budget": budget, "seconds": seconds, "plain_seconds": plain})
    return points


def _median_seconds(bench: Bench, call: Any, steps: int, measured: Sequence[Prompt]) -> float:
    bench.model.render(call, measured[:1], steps=steps, batch=1)  # warm-up
    seconds = []
    for prompt in measured[:TIMED_PROMPTS]:
        started = time.perf_counter()
        bench.model.render(call, [prompt], steps=steps, batch=1)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    job_file, row_file = map(Path, sys.argv[1:])
    with torch.inference_mode():
        row = run_row(Job(**json.loads(job_file.read_text("utf-8"))))
    row_file.write_text(json.dumps(row), "utf-8")


if __name__ == "__main__":
    main()
