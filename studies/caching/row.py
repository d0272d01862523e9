"""One job in a separate process: search a method's settings, then measure the best of them.

python -m studies.caching.row JOB.json ROW.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from studies.caching.jobs import REFERENCES, Job, limit_of, method_of, name_of
from studies.caching.methods import Method, UnsupportedError
from studies.caching.results import Score, failed_row, scored_row
from studies.caching.search import gentlest, geometric
from studies.caching.workload import Model, Prompt, prompts

from hasten.quality import lpips, psnr, ssim
from hasten.results import Row

__all__ = ["Bench", "perform", "run_row"]

STEPS = 50
KNOB_VALUES = 48
FINE_VALUES = 8
CHUNK = 25
LEAST = 0.8  # of what a budget pays for
RETRIES = 4
BATCH = {"cuda": 100, "cpu": 4}

Setting = dict[str, Any]
Part = dict[str, Any]
"""What a job leaves behind: `rows`, pairs of a budget and a row, and `fault` where it broke off."""


class Bench:
    """Applies settings of one method to new pipelines and scores their images."""

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

    def measure(self, setting: Setting, chosen: Sequence[Prompt], limit: float) -> Score:
        """`score`; of a method that gets one image at a time, on fewer prompts where the first ones
        cost more than `limit`."""
        if not self.method.single:
            return self.score(setting, chosen)
        call = self.apply(setting)
        score = self.score(setting, chosen[:CHUNK], call)
        for start in range(CHUNK, len(chosen), CHUNK):
            if score.cost > limit:
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


def run_row(job: Job, keep: Callable[[Part], None] = lambda _: None) -> Part:
    """The job's rows. `keep` gets them after every budget, and with a `fault` where an exception
    ends it."""
    name = name_of(job)
    part: Part = {"rows": [], "fault": None}
    try:
        bench = Bench(
            Model(job.model, job.device, job.blocks), method_of(job), job.batch or _batch_for(job)
        )
        for budget, row in _rows(bench, job, name, *prompts(job.search, job.last)):
            part["rows"].append([budget, row.model_dump(mode="json")])
            keep(part)
    except UnsupportedError as error:
        row = failed_row(name, str(error), unsupported=True)
        part["rows"] = [[budget, row.model_dump(mode="json")] for budget in job.budgets]
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        keep({**part, "fault": f"{type(error).__name__}: {line}"})
        raise
    return part


def render_references(job: Job) -> Part:
    """Make or check the full runs on disk, for all other jobs of this model."""
    model = Model(job.model, job.device)
    model.check_references()
    search, measured = prompts(job.search, job.last)
    model.references([*search, *measured], job.batch or _batch_for(job))
    return {"rows": [], "fault": None}


def _rows(
    bench: Bench, job: Job, name: str, search: Sequence[Prompt], measured: Sequence[Prompt]
) -> Iterator[tuple[float, Row]]:
    if job.method.endswith(".toml"):
        yield from _recipe_rows(bench, job, name, measured)
        return
    finder: Any = _Stored(job.stored) if job.stored else _finder(bench, search)
    for budget in job.budgets:
        yield budget, _best_row(bench, job, name, finder, budget, measured)
        print(f"{name}: budget {budget} done", file=sys.stderr, flush=True)


def _recipe_rows(
    bench: Bench, job: Job, name: str, measured: Sequence[Prompt]
) -> Iterator[tuple[float, Row]]:
    """A recipe has one setting, which serves every budget that it fits."""
    setting = bench.method.settings(0)[0]
    score = bench.score(setting, measured)
    for budget in job.budgets:
        if LEAST * budget < score.cost <= limit_of(budget):
            yield budget, scored_row(name, setting, score, measured, notes=job.notes)
        else:
            yield budget, failed_row(name, f"it costs {score.cost:.2f} evaluations")


def _best_row(
    bench: Bench, job: Job, name: str, finder: Any, budget: float, measured: Sequence[Prompt]
) -> Row:
    """The row of the method's best setting within the budget, or of the reason there is none."""
    target = limit = limit_of(budget)
    bound = math.inf if job.stored else limit
    for _ in range(RETRIES):
        setting, tried = finder.best(budget, target)
        if setting is None:
            return failed_row(name, tried)
        score = bench.measure(setting, measured, bound)
        if not math.isfinite(sum(score.lpips)):
            return failed_row(name, "its images are not finite")
        if score.cost <= bound:
            notes = [*([bench.method.note] if bench.method.note else []), *job.notes]
            over = ["over budget on these prompts"] if score.cost > limit else []
            return scored_row(name, setting, score, measured, tried, [*notes, *over])
        target *= 0.998 * limit / score.cost
    return failed_row(name, "no setting stayed within budget")


def _batch_for(job: Job) -> int:
    return BATCH[torch.device(job.device).type]


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


def perform(job_file: Path, row_file: Path) -> None:
    """Do a job file's job; the row file holds its rows so far, after every one."""

    def keep(part: Part) -> None:
        temporary = row_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(part), "utf-8")
        temporary.replace(row_file)

    job = Job(**json.loads(job_file.read_text("utf-8")))
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 as a CPU has it
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        keep(render_references(job) if job.method == REFERENCES else run_row(job, keep))


if __name__ == "__main__":
    perform(*map(Path, sys.argv[1:]))
