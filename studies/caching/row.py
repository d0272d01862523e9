"""One job in a process of its own: search a method's settings, then measure the best of them.

python -m studies.caching.row JOB.json ROW.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from studies.caching.jobs import REFERENCES, Job, empty_row, limit_of, method_of
from studies.caching.methods import Method, UnsupportedError
from studies.caching.search import gentlest, geometric
from studies.caching.workload import Model, Prompt, prompts

from hasten.quality import lpips, psnr, ssim

__all__ = ["Bench", "Score", "perform", "point_of", "run_row"]

STEPS = 50
KNOB_VALUES = 48
FINE_VALUES = 8
CHUNK = 25
LEAST = 0.8  # of the steps that a budget pays for
TIMED_PROMPTS = 5
RETRIES = 4
BATCH = {"cuda": 100, "cpu": 4}

Setting = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """Per prompt: distance and likeness to the reference, and cost."""

    lpips: list[float]
    ssim: list[float]
    psnr: list[float]
    evaluations: list[float]
    computed: list[float]

    def __add__(self, other: Score) -> Score:
        mine, theirs = asdict(self), asdict(other)
        return Score(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def cost(self) -> float:
        return statistics.mean(self.evaluations)


class Bench:
    """Applies settings of one method to fresh pipelines and scores what they draw."""

    def __init__(self, model: Model, method: Method, batch: int) -> None:
        self.model = model
        self.method = method
        self.batch = batch
        self.known: dict[tuple[str, int], Score] = {}

    def score(self, setting: Setting, chosen: Sequence[Prompt], call: Any = None) -> Score:
        """Render `chosen` under `setting` and compare with the plain pipeline's full runs."""
        call = call or self.apply(setting)
        batch = 1 if self.method.single else self.batch
        steps = setting.get("steps")
        drawn = self.model.render(call, chosen, steps=steps, batch=batch)
        if not drawn.images.isfinite().all():  # some solver options divide by zero here
            return _worst(chosen, drawn.evaluations)
        reference = self.model.references(chosen)
        return Score(
            lpips(drawn.images, reference, batch_size=self.batch).tolist(),
            ssim(drawn.images, reference).tolist(),
            psnr(drawn.images, reference).tolist(),
            drawn.evaluations,
            drawn.computed,
        )

    def apply(self, setting: Setting) -> Any:
        return self.method.apply(self.model.pipeline(), dict(setting))

    def measure(
        self, setting: Setting, chosen: Sequence[Prompt], limit: float, until: float | None
    ) -> Score:
        """`score`; of a method that gets one image at a time, on fewer prompts where the first ones
        cost more than `limit` or the clock has passed `until`."""
        if not self.method.single:
            return self.score(setting, chosen)
        call = self.apply(setting)
        score = self.score(setting, chosen[:CHUNK], call)
        for start in range(CHUNK, len(chosen), CHUNK):
            if score.cost > limit or (until and time.time() > until):
                break
            score = score + self.score(setting, chosen[start : start + CHUNK], call)
        return score

    def trial(self, setting: Setting, chosen: Sequence[Prompt]) -> Score:
        """`score`, remembered: searches come back to the same settings. One that the method itself
        refuses is as bad as can be, and no reason to lose the others."""
        key = (json.dumps(setting, sort_keys=True), len(chosen))
        if key not in self.known:
            try:
                self.known[key] = self.score(setting, chosen)
            except (ValueError, TypeError, NotImplementedError):
                traceback.print_exc()
                self.known[key] = _worst(chosen, [math.inf] * len(chosen))
        return self.known[key]

    def error(self, setting: Setting, chosen: Sequence[Prompt]) -> float:
        return statistics.mean(self.trial(setting, chosen).lpips)

    def cost(self, setting: Setting, chosen: Sequence[Prompt]) -> float:
        return self.trial(setting, chosen).cost


def _worst(chosen: Sequence[Prompt], evaluations: list[float]) -> Score:
    infinite = [math.inf] * len(chosen)
    return Score(infinite, infinite, infinite, evaluations, evaluations)


def run_row(job: Job, keep: Callable[[Row], None] = lambda _: None) -> Row:
    """The row: points, or the reason why there are none. `keep` gets it after every point, and with
    a `fault` where an exception ends it."""
    started = time.monotonic()
    row = empty_row(job)
    try:
        bench = Bench(
            Model(job.model, job.device, job.blocks), method_of(job), job.batch or _batch_for(job)
        )
        for point in _all_points(bench, job, *prompts(job.search, job.last)):
            row["points"].append(point)
            row["seconds"] = round(time.monotonic() - started, 1)
            keep(row)
    except UnsupportedError as error:
        return {**row, "points": [], "reason": str(error)}
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        keep({**row, "fault": f"{type(error).__name__}: {line}"})
        raise
    return row


def render_references(job: Job) -> Row:
    """Make or check the full runs on disk, for all other jobs of this model."""
    model = Model(job.model, job.device)
    model.check_references()
    search, measured = prompts(job.search, job.last)
    model.references([*search, *measured], job.batch or _batch_for(job))
    return {"method": REFERENCES, "points": [], "reason": None}


def _batch_for(job: Job) -> int:
    return BATCH[torch.device(job.device).type]


def _all_points(
    bench: Bench, job: Job, search: Sequence[Prompt], measured: Sequence[Prompt]
) -> Iterator[Row]:
    if job.timed:
        yield from _timed(bench, job, measured)
    elif job.method.endswith(".toml"):
        setting = bench.method.settings(0)[0]
        yield point_of(None, setting, bench.score(setting, measured))
    else:
        yield from _points(bench, job, search, measured)


def _points(
    bench: Bench, job: Job, search: Sequence[Prompt], measured: Sequence[Prompt]
) -> Iterator[Row]:
    found: Any = _Stored(job.stored) if job.stored else _finder(bench, search)
    for budget in job.budgets:
        target = limit = limit_of(budget)
        for _ in range(RETRIES):
            setting, tried = found.best(budget, target)
            if setting is None:
                yield {"budget": budget, "setting": None, "reason": tried}
                break
            bound = math.inf if job.stored else limit
            score = bench.measure(setting, measured, bound, job.until)
            if not math.isfinite(sum(score.lpips)):
                yield {"budget": budget, "setting": None, "reason": "its images are not finite"}
                break
            point = {**point_of(budget, setting, score), "tried": tried}
            if score.cost <= bound:
                over = {"reason": "over budget on these prompts"} if score.cost > limit else {}
                yield point | over
                break
            target *= 0.998 * limit / score.cost
        else:
            yield {"budget": budget, "setting": None, "reason": "no setting stayed within budget"}
        print(f"{bench.method.name}: budget {budget} done", file=sys.stderr, flush=True)


def point_of(budget: float | None, setting: Setting, score: Score) -> Row:
    """A measured setting as the results file has it: means, and every prompt's values."""
    means = {name: statistics.mean(values) for name, values in asdict(score).items()}
    per_prompt = {
        name: [round(value, 6) for value in values] for name, values in asdict(score).items()
    }
    if len(set(per_prompt["evaluations"])) == 1:  # a static plan
        del per_prompt["evaluations"], per_prompt["computed"]
    point = {"budget": budget, "setting": setting, **means, "n": len(score.lpips)}
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
        counts = sorted(range(1, STEPS), key=lambda count: abs(count - half))
        count, probe = next(
            (n, offered[0]) for n in counts if (offered := bench.method.settings(n))
        )
        cost = bench.score(probe, search).cost
        self.skip = max(0.0, (cost - count) / (STEPS - count))

    def best(self, budget: float, target: float) -> tuple[Setting | None, Any]:
        """The closest of the candidates that compute as much as the budget pays for, or nearly."""
        computed = math.floor((target - STEPS * self.skip) / (1 - self.skip) + 1e-6)
        least = max(1, math.ceil(LEAST * computed))
        for fewer in range(computed, least - 1, -1):
            candidates = self.bench.method.settings(fewer)
            if candidates and self.bench.cost(candidates[0], self.search) <= target:
                best = min(candidates, key=lambda one: self.bench.error(one, self.search))
                return best, len(candidates)
        if computed < 1:
            return None, f"a skipped step still costs {self.skip:.3f} evaluations"
        return None, f"nothing computes {least} to {computed} steps"


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
        """Of the options' gentlest thresholds the closest, then one a little finer."""
        fitting: list[tuple[Setting, int]] = []
        for option in self.bench.method.settings(0):
            guess = fitting[-1][1] if fitting else None
            index = self._gentlest(option, self.values, target, guess)
            if index is not None:
                fitting.append((option, index))
        if not fitting:
            return None, "no threshold comes down to this budget"

        def error(choice: tuple[Setting, int]) -> float:
            option, index = choice
            return self.bench.error(self._with(option, self.values[index]), self.search)

        option, index = min(fitting, key=error)
        value = self.values[index]
        finer = geometric(self.values[max(index - 1, 0)], value, FINE_VALUES + 1)[1:]
        place = self._gentlest(option, finer, target, None)
        value = value if place is None else finer[place]
        return self._with(option, value), len(self.bench.known)

    def _gentlest(
        self, option: Setting, values: Sequence[float], target: float, guess: int | None
    ) -> int | None:
        return gentlest(
            values,
            target,
            lambda value: self.bench.cost(self._with(option, value), self.search),
            guess,
        )

    def _with(self, option: Setting, value: float) -> Setting:
        return {**option, **self.extra, self.knob.name: float(f"{value:.4g}")}

    def _run(self, pipe: Any) -> None:
        self.bench.model.render(pipe, self.search, batch=len(self.search))


def _finder(bench: Bench, search: Sequence[Prompt]) -> _ListFinder | _KnobFinder:
    return _KnobFinder(bench, search) if bench.method.knob else _ListFinder(bench, search)


def _timed(bench: Bench, job: Job, measured: Sequence[Prompt]) -> Iterator[Row]:
    """Median seconds an image, one at a time, beside the plain pipeline's on the same prompts."""
    plain = _median_seconds(bench.model, bench.model.pipeline(), STEPS, measured)
    for budget, setting in (job.stored or {}).items():
        call = bench.apply(setting)
        seconds = _median_seconds(bench.model, call, setting.get("steps", STEPS), measured)
        yield {"budget": budget, "seconds": seconds, "plain_seconds": plain}


def _median_seconds(model: Model, call: Any, steps: int, measured: Sequence[Prompt]) -> float:
    model.draw(call, measured[:1], steps)  # warm-up
    seconds = []
    for prompt in measured[:TIMED_PROMPTS]:
        model.synchronize()
        started = time.perf_counter()
        model.draw(call, [prompt], steps)
        model.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def perform(job_file: Path, row_file: Path) -> None:
    """Do a job file's job; the row file holds what there is of the row, after every point."""

    def keep(row: Row) -> None:
        temporary = row_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(row), "utf-8")
        temporary.replace(row_file)

    job = Job(**json.loads(job_file.read_text("utf-8")))
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 as a CPU has it
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        keep(render_references(job) if job.method == REFERENCES else run_row(job, keep))


if __name__ == "__main__":
    perform(*map(Path, sys.argv[1:]))
