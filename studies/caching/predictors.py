"""Compares candidate predictors for skipped steps, on the same steps, against the full run.

    python -m studies.caching.predictors --device cuda
    python -m studies.caching.predictors --held 2 --learn 2 --budgets 10   # a quick look

Steps: those of the model's learned schedules, and as many evenly spaced. Fitted predictors learn on
the first prompts of the bundled set; all are judged on the last ones, by the relative error of the
final latents and by LPIPS. Writes RESULTS/predictors.json and predictors.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from studies.caching.weights import (
    Weights,
    dynamic_mode,
    exponential,
    extrapolation,
    filled,
    reuse,
    taylor,
)
from studies.caching.workload import ROOT, Model, Prompt, prompts
from torch import Tensor

from hasten.calibration.closed_loop import fit_closed_loop
from hasten.calibration.trajectories import Trajectories, at_scheduler_step, record
from hasten.passes.cache.predict import damped
from hasten.quality import lpips
from hasten.step.block_hooks import BlockHooks

__all__ = ["CANDIDATES", "Ground", "Known", "markdown"]

STEPS = 50
RESULTS = ROOT / "studies" / "results" / "caching"
SHIPPED = ROOT / "src" / "hasten" / "schedules"
FITTED_ORDERS = (1, 2, 3, 4)
MODE_BOUNDS = (0.2, 5.0)  # of a ratio whose logarithm is taken


@dataclass(frozen=True)
class Ground:
    """The inputs of a weight-based candidate: the steps computed, the N + 1 noise levels, and
    full runs of the prompts to learn on."""

    path: tuple[int, ...]
    sigmas: tuple[float, ...]
    learned: Trajectories


# --- candidates whose weights do not look at the run ----------------------------------------------


def _in_sigma(weigh: Any, ground: Ground, *, whole_gap: bool = False) -> list[Weights]:
    return filled(ground.path, ground.sigmas, lambda _: weigh, whole_gap=whole_gap)


def _in_steps(weigh: Any, ground: Ground) -> list[Weights]:
    return filled(ground.path, range(len(ground.sigmas)), lambda _: weigh)


def _mode(ground: Ground) -> list[Weights]:
    """One exponential through the newest two velocities, its rate learned for each gap."""

    def weigh(gap: int) -> Any:
        if gap < 1:
            return reuse
        new, old = (ground.learned.velocities[ground.path[i]].flatten() for i in (gap, gap - 1))
        span = ground.sigmas[ground.path[gap]] - ground.sigmas[ground.path[gap - 1]]
        return dynamic_mode(_log_ratio(new @ old, old @ old) / span)

    return filled(ground.path, ground.sigmas, weigh)


def _mode_of_slopes(ground: Ground) -> list[Weights]:
    """An exponential through the newest two slopes, its rate learned for each gap."""

    def slope(gap: int) -> tuple[Tensor, float]:
        new, old = ground.path[gap], ground.path[gap - 1]
        difference = ground.learned.velocities[new] - ground.learned.velocities[old]
        span = ground.sigmas[new] - ground.sigmas[old]
        return difference.flatten() / span, (ground.sigmas[new] + ground.sigmas[old]) / 2

    def weigh(gap: int) -> Any:
        if gap < 2:
            return exponential(0.0)
        (new, here), (old, there) = slope(gap), slope(gap - 1)
        return exponential(_log_ratio(new @ old, old @ old) / (here - there))

    return filled(ground.path, ground.sigmas, weigh)


def _log_ratio(product: Tensor, square: Tensor) -> float:
    low, high = MODE_BOUNDS
    return math.log(min(max(float(product / square), low), high))


CANDIDATES: dict[str, Callable[[Ground], list[Weights]]] = {
    "reuse": partial(_in_sigma, reuse),
    "linear in σ": partial(_in_sigma, extrapolation(1)),
    "damped in σ": partial(_in_sigma, damped),
    "quadratic in σ": partial(_in_sigma, extrapolation(2)),
    "cubic in σ": partial(_in_sigma, extrapolation(3)),
    "Adams–Bashforth 2, over the gap": partial(_in_sigma, extrapolation(1), whole_gap=True),
    "Adams–Bashforth 3, over the gap": partial(_in_sigma, extrapolation(2), whole_gap=True),
    "Adams–Bashforth 4, over the gap": partial(_in_sigma, extrapolation(3), whole_gap=True),
    "Taylor 1 in steps": partial(_in_steps, taylor(1)),
    "Taylor 2 in steps": partial(_in_steps, taylor(2)),
    "Hermite 1 in steps": partial(_in_steps, taylor(1, contraction=0.5)),
    "Hermite 2 in steps": partial(_in_steps, taylor(2, contraction=0.5)),
    "exponential, learned": _mode,
    "exponential slope, learned": _mode_of_slopes,
}


# --- filling the steps of a run -------------------------------------------------------------------


class Known:
    """At the scheduler's step: the weighted sum of the velocities at computed steps."""

    def __init__(self, path: Sequence[int], rows: Sequence[Weights]) -> None:
        self.path = path
        self.rows = rows
        self.known: list[Tensor] = []  # newest first

    def __call__(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """The velocity of step `index`; `velocity` counts on computed steps alone."""
        if index in self.path:
            self.known.insert(0, velocity)
        return weighted(self.known, self.rows[index])


class Mode:
    """An exponential through the newest two velocities, its rate measured on each image's run."""

    def __init__(self, path: Sequence[int], sigmas: Sequence[float]) -> None:
        self.path = path
        self.sigmas = sigmas
        self.known: list[tuple[float, Tensor]] = []

    def __call__(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        here = self.sigmas[index]
        if index in self.path:
            self.known.insert(0, (here, velocity))
        if len(self.known) < 2 or index in self.path:
            return self.known[0][1]
        (start, new), (before, old) = self.known[:2]
        dims = tuple(range(1, new.ndim))
        ratio = (new * old).sum(dims, keepdim=True) / old.square().sum(dims, keepdim=True)
        return new * ratio.clamp(*MODE_BOUNDS) ** ((here - start) / (start - before))


def weighted(newest_first: Sequence[Tensor], weights: Weights) -> Tensor:
    """Σ weights[k] · newest_first[k]."""
    pairs = zip(newest_first, weights, strict=False)
    first, *rest = [value * weight for value, weight in pairs]
    return sum(rest, start=first)


class StackResidual:
    """Looks at a call between its blocks: keeps what all of them add to the image tokens, or adds
    the weighted sum of what they added before (`weights`) and skips them."""

    def __init__(self, known: list[Tensor], weights: Weights | None) -> None:
        self.known, self.weights = known, weights
        self.start: Tensor

    def before(self, index: int, streams: dict[str, Tensor]) -> bool:
        if index == 0:
            self.start = streams["hidden_states"]
        return self.weights is not None

    def after_last(self, streams: dict[str, Tensor], *, skipped: bool) -> dict[str, Tensor]:
        if self.weights is None:
            self.known.insert(0, streams["hidden_states"] - self.start)
            return streams
        return {**streams, "hidden_states": self.start + weighted(self.known, self.weights)}


@contextmanager
def residual_cache(pipe: Any, path: Sequence[int], rows: Sequence[Weights]) -> Iterator[None]:
    """Inside, a skipped step adds a weighted sum of the block stack's past residuals H_end − H_0 to
    its own embedding and runs the output layers: `rows` as for velocities."""
    from hasten.families import family_of

    transformer, scheduler = pipe.transformer, pipe.scheduler
    blocks = family_of(pipe).blocks(transformer)
    hooks = BlockHooks([(block, stack.returns) for _, block, stack in blocks])
    original = transformer.forward
    branches: dict[int, list[Tensor]] = {}  # by order of the call in its step, newest first
    last = [-1, 0]  # step, calls in it

    def forward(**kwargs: Any) -> Any:
        step = scheduler.step_index or 0
        last[:] = [step, last[1] + 1 if step == last[0] else 0]
        known = branches.setdefault(last[1], [])
        with hooks.visited_by(StackResidual(known, None if step in path else rows[step])):
            return original(**kwargs)

    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward
        hooks.remove()


# --- the comparison -------------------------------------------------------------------------------


class Comparison:
    """All candidates on given steps of one model."""

    def __init__(self, model: Model, learn: Sequence[Prompt], held: Sequence[Prompt]) -> None:
        self.model = model
        self.pipe = model.pipeline()
        self.learn = learn
        self.held = held
        self.learned = record(
            lambda ids: model.latents(self.pipe, [learn[i] for i in ids]),
            self.pipe,
            [range(len(learn))],
            lambda *_: None,
        )
        self.full = model.latents(self.pipe, held)
        self.images = model.decoded(self.full)

    def on(self, path: tuple[int, ...]) -> Iterator[tuple[str, dict[str, float]]]:
        """(candidate, its errors) with these steps computed."""
        import hasten
        from hasten.recipe import Recipe, ScheduleCache

        ground = Ground(path, self.learned.sigmas, self.learned)
        bare = Recipe(cache=ScheduleCache(steps=STEPS, compute=path, predictor="reuse"))
        fast = hasten.optimize(self.pipe, bare)  # skips; what stands in is put in at the scheduler
        try:
            for name, weights in CANDIDATES.items():
                yield name, self._judge(fast, Known(path, weights(ground)))
            yield "exponential, on the run", self._judge(fast, Mode(path, ground.sigmas))
            for order in FITTED_ORDERS:
                rows = self._fitted(fast, path, order)
                yield f"fitted, {order}", self._judge(fast, Known(path, rows))
        finally:
            fast.restore()
        for name in ("reuse", "linear in σ"):
            with residual_cache(self.pipe, path, CANDIDATES[name](ground)):
                yield f"{name}, of the residual", self._judge(self.pipe, None)

    def _fitted(self, fast: Any, path: tuple[int, ...], order: int) -> list[Weights]:
        gaps, _ = fit_closed_loop(
            lambda ids: self.model.latents(fast, [self.learn[i] for i in ids]),
            self.pipe.scheduler,
            self.learned,
            path,
            order=order,
            batch=len(self.learn),
        )
        stops = (*path[1:], STEPS)
        spans = zip(gaps, path, stops, strict=True)
        return [weights for weights, start, stop in spans for _ in range(start, stop)]

    def _judge(self, call: Any, at_step: Any) -> dict[str, float]:
        on_step = at_step or (lambda _, velocity, __: velocity)
        with at_scheduler_step(self.pipe.scheduler, on_step):
            latents = self.model.latents(call, self.held)
        if not latents.isfinite().all():
            return {"error": math.inf, "lpips": math.inf}
        images = self.model.decoded(latents)
        return {
            "error": _relative_error(latents, self.full),
            "lpips": float(lpips(images, self.images, batch_size=len(images)).mean()),
        }


def _relative_error(latents: Tensor, reference: Tensor) -> float:
    """Mean over N of ‖latents − reference‖ / ‖reference‖, both N×tokens×channels."""
    distance = (latents - reference).flatten(1).norm(dim=1)
    return float((distance / reference.flatten(1).norm(dim=1)).mean())


def paths_of(folder: Path, model: str, budgets: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Learned steps (where the folder has MODEL-50-K.toml) and evenly spaced ones, by name."""
    from hasten.recipe import ScheduleCache, read_recipe

    paths: dict[str, tuple[int, ...]] = {}
    for budget in budgets:
        file = folder / f"{model}-{STEPS}-{budget}.toml"
        cache = read_recipe(file).cache if file.is_file() else None
        if isinstance(cache, ScheduleCache):
            paths[f"learned {budget}"] = cache.compute
    for budget in budgets:
        paths[f"even {budget}"] = tuple(round(i * STEPS / budget) for i in range(budget))
    return paths


def markdown(results: dict[str, Any]) -> str:
    """Both measures: one row per candidate, one column per set of steps, the best in bold."""
    lines = [
        f"# What stands in on a skipped step: `{results['model']}`",
        "",
        f"{results['held']} prompts that nothing was fitted to; fitted and learned predictors saw "
        f"{results['learn']} others. {STEPS} steps, of which as many are computed as the column "
        "says: those of a learned schedule, or evenly spaced ones.",
    ]
    for key, title, digits in (
        ("error", "Relative error of the final latents", 4),
        ("lpips", "LPIPS to the full run", 4),
    ):
        columns = [*results["paths"]]
        least = {c: min(row[c][key] for row in results["rows"].values()) for c in columns}
        lines += ["", f"## {title}", "", "| predictor | " + " | ".join(columns) + " |"]
        lines.append("|---|" + "---:|" * len(columns))
        for name, row in results["rows"].items():
            cells = [f"{row[c][key]:.{digits}f}" for c in columns]
            marked = [
                f"**{cell}**" if row[c][key] == least[c] else cell
                for c, cell in zip(columns, cells, strict=True)
            ]
            lines.append(f"| {name} | " + " | ".join(marked) + " |")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    from hasten.benchmark.environment import detect
    from hasten.machine import machine

    began = time.time()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = machine().usable_device(options.device)
    learn, held = prompts(options.learn, options.held)
    paths = paths_of(options.recipes, options.model, options.budgets)
    rows: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        comparison = Comparison(Model(options.model, device), learn, held)
        for column, path in paths.items():
            for name, errors in comparison.on(path):
                rows.setdefault(name, {})[column] = errors
            print(f"{column}: {time.time() - began:.0f} s", flush=True)
    results = {
        "schema": 1,
        "model": options.model,
        "learn": options.learn,
        "held": options.held,
        "paths": paths,
        "rows": rows,
        "environment": detect("tiny", device, "float32").environment.model_dump(exclude_none=True),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    name = "predictors" if options.model == "tiny" else f"predictors-{options.model}"
    (options.results / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (options.results / f"{name}.md").write_text(markdown(results), "utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("tiny", "teacher"), default="tiny")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--budgets", nargs="+", type=int, default=[25, 17, 13, 10])
    parser.add_argument("--learn", type=int, default=16, help="prompts to fit on, the first ones")
    parser.add_argument("--held", type=int, default=16, help="prompts to judge on, the last ones")
    parser.add_argument("--recipes", type=Path, default=SHIPPED, metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
