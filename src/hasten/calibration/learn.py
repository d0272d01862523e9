"""`hasten.calibrate`: from a pipeline and some prompts to a recipe with a learned schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.apply import optimize
from hasten.calibration.closed_loop import fit_closed_loop
from hasten.calibration.cost import GapCosts, gram_matrix
from hasten.calibration.objective import (
    Objective,
    ObjectiveName,
    picture_distance,
    relative_error,
)
from hasten.calibration.search import best_path, neighbours, path_cost
from hasten.calibration.store import Fitted, Store
from hasten.calibration.trajectories import Trajectories, record
from hasten.errors import InputError
from hasten.models.fingerprint import fingerprint
from hasten.pipeline import OptimizedPipeline
from hasten.recipe import Cache, IntervalCache, Recipe, ScheduleCache

__all__ = ["Calibration", "Request", "calibrate", "request_of", "search_plan"]

ORDERS = (1, 2, 3, 4)  # how many computed velocities a gap combines
POWERS = (1.0, 2.0)  # of a gap's error in the searched cost: each gives a path to start from
CLIMB = 120  # evaluations of the transformer, a batch of prompts each
REACHES = (2, 4, 8)  # how far a climb moves a computed step; the next once one is exhausted
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What was learned, and how good it is on held-back prompts.

    recipe: the schedule; interval: the plain interval with at least as many computed steps; error
    and interval_error: their relative errors of the final latents; lpips and interval_lpips: mean
    LPIPS of their pictures against the full run's; better: whether the schedule is worth having, by
    the objective it was learned for.
    """

    recipe: Recipe
    interval: IntervalCache
    error: float
    interval_error: float
    lpips: float
    interval_lpips: float
    objective: ObjectiveName

    @property
    def better(self) -> bool:
        if self.objective == "lpips":
            return self.lpips < self.interval_lpips
        return self.error < self.interval_error


@dataclass(frozen=True)
class Request:
    """A pipeline and how to sample it: image i depends on prompt i and seed + i alone.

    arguments: of the pipeline's call, with `num_inference_steps`, `height` and `width`.
    """

    pipe: Any
    prompts: Sequence[str]
    seed: int
    batch: int
    arguments: dict[str, Any]

    def run(self, call: Callable[..., Any], ids: Sequence[int]) -> Tensor:
        """Final latents, P×tokens×channels, of these prompts."""
        noise = [torch.Generator("cpu").manual_seed(self.seed + i) for i in ids]
        texts = [self.prompts[i] for i in ids]
        arguments = dict(self.arguments)
        if isinstance(arguments.get("negative_prompt"), str):  # pipelines want one for each prompt
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(ids)
        latents: Tensor = call(texts, generator=noise, output_type="latent", **arguments).images
        return latents

    def run_all(self, call: Callable[..., Any], ids: range) -> Tensor:
        """The same in batches; P×D, float32, on the CPU."""
        parts = [self.run(call, ids[i : i + self.batch]) for i in range(0, len(ids), self.batch)]
        return torch.cat(parts).flatten(1).float().cpu()

    def objective(self, name: ObjectiveName, full: Trajectories) -> Objective:
        """Judges final latents of the prompts that `full` recorded."""
        reference = full.latents[-1]
        if name == "latent":
            return relative_error(reference)
        height, width = self.arguments["height"], self.arguments["width"]
        return picture_distance(self.pipe, reference, height, width)

    def key(self) -> dict[str, Any]:
        """What recordings and trials depend on; `trials.jsonl` also on what they minimise."""
        return {
            "fingerprint": fingerprint(self.pipe.transformer),
            "dtype": str(self.pipe.dtype),
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            "seed": self.seed,
            "batch": self.batch,
            "arguments": {name: repr(value) for name, value in sorted(self.arguments.items())},
        }


@torch.no_grad()
def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    budget: int,
    steps: int = 50,
    objective: ObjectiveName = "latent",
    climb: int = CLIMB,
    held_back: int = 8,
    batch: int = 8,
    seed: int = 0,
    state: Path | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> Calibration:
    """Learn which `budget` of `steps` steps to compute on this pipeline, which stays as it was.

    prompts: the last `held_back` of them only check what the others taught (16 + 8 are enough for
    FLUX-like models); objective: what to keep near the full run, the final latents or the picture
    (LPIPS; every trial is decoded); climb: transformer evaluations, a batch of prompts each, to
    spend on improving the searched plan; state: a folder that keeps recordings and trials as they
    finish, from which a later call goes on, also with another budget; arguments: of the pipeline's
    call (height, width, guidance_scale, true_cfg_scale, max_sequence_length …). Deterministic for
    a seed.

    Raises InputError for a budget outside 1…steps, too few prompts, or a state of something else.
    """
    show = progress or (lambda *_: None)
    _refuse(prompts, budget, steps, held_back)
    request = request_of(pipe, prompts, steps, seed, batch, arguments)
    learned = len(prompts) - held_back
    store = Store(state, request.key() | {"learned": learned, "objective": objective})
    every = record(
        lambda ids: request.run(request.pipe, ids),
        request.pipe,
        len(prompts),
        batch,
        lambda done, total: show("record full runs", done, total),
        store,
    )
    full, held = every.of(slice(0, learned)), every.of(slice(learned, None))
    best = search_plan(
        request, full, budget, request.objective(objective, full), climb, store, show
    )
    schedule = ScheduleCache(
        steps=full.steps,
        compute=best.path,
        weights=best.weights,
        sigmas=tuple(round(sigma, 6) for sigma in full.sigmas[:-1]),
        fingerprint=fingerprint(request.pipe.transformer),
    )
    interval = _interval_of(budget, steps)
    show("check on held-back prompts", 0, 2)
    judges = request.objective("latent", held), request.objective("lpips", held)
    error, distance = _held_back(request, schedule, judges, range(learned, len(prompts)))
    show("check on held-back prompts", 1, 2)
    interval_error, interval_distance = _held_back(
        request, interval, judges, range(learned, len(prompts))
    )
    show("check on held-back prompts", 2, 2)
    recipe = Recipe(
        name=f"schedule-{budget}-of-{steps}",
        description=f"{budget} of {steps} steps, learned on {learned} prompts",
        cache=ScheduleCache(**{**dict(schedule), "expected_error": round(error, 6)}),
    )
    return Calibration(
        recipe, interval, error, interval_error, distance, interval_distance, objective
    )


def search_plan(
    request: Request,
    full: Trajectories,
    budget: int,
    objective: Objective,
    climb: int,
    store: Store,
    show: Progress,
) -> Fitted:
    """Search on inner products, then climb from there by what a plan really gives when it runs."""

    def run(path: tuple[int, ...], order: int) -> Fitted:
        known = store.trial(path, order)
        if known is None:
            known = _closed_loop(request, full, objective, path, order)
            store.keep_trial(known)
        return known

    costs = GapCosts(gram_matrix(full), full.sigmas)
    starts = dict.fromkeys(best_path(costs, full.steps, budget, power) for power in POWERS)
    pairs = [(path, order) for path in starts for order in ORDERS]
    found = []
    for number, (path, order) in enumerate(pairs):
        show("fit", number, len(pairs))
        found.append(run(path, order))
    best = min(found, key=lambda fitted: fitted.error)
    tried = set(starts)
    trials = climb // budget
    for trial in range(trials):
        show("climb", trial, trials)
        near = _untried(best.path, full.steps, tried)
        if not near:
            break
        path = min(near, key=lambda path: path_cost(costs, path, full.steps))
        tried.add(path)
        best = min(best, run(path, best.order), key=lambda fitted: fitted.error)
    show("climb", trials, trials)
    return best


def _untried(
    path: tuple[int, ...], steps: int, tried: set[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Paths near this one, from the least reach that has any left."""
    for reach in REACHES:
        near = [other for other in neighbours(path, steps, reach) if other not in tried]
        if near:
            return near
    return []


def _closed_loop(
    request: Request, full: Trajectories, objective: Objective, path: tuple[int, ...], order: int
) -> Fitted:
    bare = ScheduleCache(steps=full.steps, compute=path, predictor="reuse")
    fast = optimize(request.pipe, Recipe(cache=bare))
    try:
        weights, error = fit_closed_loop(
            lambda ids: request.run(fast, ids),
            request.pipe.scheduler,
            full,
            path,
            order=order,
            batch=request.batch,
            objective=objective,
        )
    finally:
        fast.restore()
    return Fitted(error, path, order, weights)


def _held_back(
    request: Request, cache: Cache, judges: tuple[Objective, Objective], ids: range
) -> tuple[float, float]:
    """What both say of the final latents of these prompts, sampled as a user would."""
    fast: OptimizedPipeline = optimize(request.pipe, Recipe(cache=cache))
    try:
        finals = request.run_all(fast, ids)
    finally:
        fast.restore()
    return judges[0](finals), judges[1](finals)


def request_of(
    pipe: Any, prompts: Sequence[str], steps: int, seed: int, batch: int, arguments: dict[str, Any]
) -> Request:
    """The plain pipeline with the arguments a call of it would have."""
    fast = optimize(pipe, Recipe())
    plain, defaults = fast.pipe, fast.call_defaults
    fast.restore()
    side = plain.default_sample_size * plain.vae_scale_factor
    size = {"height": side, "width": side}
    asked = {**size, **defaults, **arguments, "num_inference_steps": steps}
    return Request(plain, prompts, seed, batch, asked)


def _interval_of(budget: int, steps: int) -> IntervalCache:
    """The interval plan (start 2) that computes at least as many steps, and as few as it can."""
    start = min(2, budget)
    interval = max(1, (steps - start) // max(1, budget - start))
    return IntervalCache(start_step=start, interval=interval)


def _refuse(prompts: Sequence[str], budget: int, steps: int, held_back: int) -> None:
    faults = []
    if not 1 <= budget <= steps:
        faults.append(f"budget = {budget} is not between 1 and steps = {steps}")
    if held_back < 1:
        faults.append(f"held_back = {held_back}: at least one prompt has to be held back")
    if len(prompts) <= held_back:
        faults.append(f"{len(prompts)} prompts are too few to hold {held_back} back")
    if faults:
        raise InputError(faults, "16 prompts to learn from and 8 to check on are enough")
