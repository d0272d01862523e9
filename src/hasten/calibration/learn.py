"""`hasten.calibrate`: from a pipeline and some prompts to a recipe with a learned schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.calibration.closed_loop import fit_closed_loop, relative_error
from hasten.calibration.cost import GapCosts, gram_matrix
from hasten.calibration.search import best_path, neighbours, path_cost
from hasten.calibration.trajectories import Trajectories, record
from hasten.engine import optimize
from hasten.errors import InputError
from hasten.models.fingerprint import fingerprint
from hasten.passes.cache.predict import Weights
from hasten.pipeline import OptimizedPipeline
from hasten.recipe import Cache, IntervalCache, Recipe, ScheduleCache

__all__ = ["Calibration", "calibrate"]

ORDERS = (1, 2, 3)  # how many computed velocities a gap combines
CLIMB_EVALUATIONS = 150  # of the transformer, a batch of prompts each
REACH = 2
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What was learned. Errors are relative errors of the final latents on held-back prompts.

    recipe: the schedule; error: its error; interval_error: that of the plain interval with at least
    as many computed steps; better: whether the schedule is worth having.
    """

    recipe: Recipe
    error: float
    interval: IntervalCache
    interval_error: float

    @property
    def better(self) -> bool:
        return self.error < self.interval_error


class Fitted(NamedTuple):
    """A path, its weights fitted in closed loop, and the final error that leaves."""

    error: float
    path: tuple[int, ...]
    order: int
    weights: tuple[Weights, ...]


@dataclass(frozen=True)
class Sampler:
    """Draws prompts with fixed noise: image i depends on prompt i and seed + i alone."""

    prompts: Sequence[str]
    seed: int
    arguments: dict[str, Any]

    def run(self, call: Callable[..., Any], ids: Sequence[int]) -> Tensor:
        """Final latents, P×tokens×channels, of these prompts."""
        noise = [torch.Generator("cpu").manual_seed(self.seed + i) for i in ids]
        texts = [self.prompts[i] for i in ids]
        latents: Tensor = call(
            texts, generator=noise, output_type="latent", **self.arguments
        ).images
        return latents


@torch.no_grad()
def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    budget: int,
    steps: int = 50,
    held_back: int = 8,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    **arguments: Any,
) -> Calibration:
    """Learn which `budget` of `steps` steps to compute on this pipeline, which stays as it was.

    prompts: the last `held_back` of them only check what the others taught (16 + 8 are enough for
    FLUX-like models); arguments: of the pipeline's call (height, width, guidance_scale,
    true_cfg_scale, max_sequence_length …). Deterministic for a seed.

    Raises InputError for a budget outside 1…steps or too few prompts.
    """
    show = progress or (lambda *_: None)
    _refuse(prompts, budget, steps, held_back)
    fast = optimize(pipe, Recipe())
    plain = fast.pipe
    arguments = {"num_inference_steps": steps, **fast.call_defaults, **arguments}
    arguments["num_inference_steps"] = steps
    fast.restore()
    sampler = Sampler(prompts, seed, arguments)
    every = record(
        lambda ids: sampler.run(plain, ids),
        plain,
        len(prompts),
        batch,
        lambda done, total: show("record full runs", done, total),
    )
    learned = len(prompts) - held_back
    full, held = every.of(slice(0, learned)), every.of(slice(learned, None))
    schedule = _learn(plain, sampler, full, budget, batch, show)
    interval = _interval_of(budget, steps)
    errors = []
    plans: tuple[Cache, Cache] = (schedule, interval)
    for number, cache in enumerate(plans):
        show("check on held-back prompts", number, 2)
        errors.append(_held_error(plain, sampler, cache, held, learned, batch))
    show("check on held-back prompts", 2, 2)
    recipe = Recipe(
        name=f"schedule-{budget}-of-{steps}",
        description=f"{budget} of {steps} steps, learned on {learned} prompts",
        cache=ScheduleCache(**{**dict(schedule), "expected_error": round(errors[0], 6)}),
    )
    return Calibration(recipe, errors[0], interval, errors[1])


def _learn(
    pipe: Any, sampler: Sampler, full: Trajectories, budget: int, batch: int, show: Progress
) -> ScheduleCache:
    """Search on inner products, then climb from there by what a path's closed loop really gives."""
    costs = GapCosts(gram_matrix(full), full.sigmas)

    def closed_loop(path: tuple[int, ...], order: int) -> Fitted:
        bare = ScheduleCache(steps=full.steps, compute=path, predictor="reuse")
        fast = optimize(pipe, Recipe(cache=bare))
        try:
            weights, error = fit_closed_loop(
                lambda ids: sampler.run(fast, ids),
                pipe.scheduler,
                full,
                path,
                order=order,
                batch=batch,
            )
        finally:
            fast.restore()
        return Fitted(error, path, order, weights)

    start = best_path(costs, full.steps, budget)
    found = []
    for number, order in enumerate(ORDERS):
        show("fit", number, len(ORDERS))
        found.append(closed_loop(start, order))
    best = min(found, key=lambda fitted: fitted.error)
    trials = CLIMB_EVALUATIONS // budget
    tried = {start}
    for trial in range(trials):
        show("climb", trial, trials)
        near = [p for p in neighbours(best.path, full.steps, REACH) if p not in tried]
        if not near:
            break
        path = min(near, key=lambda path: path_cost(costs, path, full.steps))
        tried.add(path)
        best = min(best, closed_loop(path, best.order), key=lambda fitted: fitted.error)
    show("climb", trials, trials)
    return ScheduleCache(
        steps=full.steps,
        compute=best.path,
        weights=best.weights,
        sigmas=tuple(round(sigma, 6) for sigma in full.sigmas[:-1]),
        fingerprint=fingerprint(pipe.transformer),
    )


def _held_error(
    pipe: Any, sampler: Sampler, cache: Cache, held: Trajectories, first: int, batch: int
) -> float:
    """Relative error of the final latents on the held-back prompts, sampled as a user would."""
    fast: OptimizedPipeline = optimize(pipe, Recipe(cache=cache))
    try:
        count = held.velocities.shape[1]
        parts = [
            sampler.run(fast, range(first + start, first + min(start + batch, count)))
            for start in range(0, count, batch)
        ]
    finally:
        fast.restore()
    finals = torch.cat(parts).flatten(1).float().cpu()
    return relative_error(finals, held.latents[-1])


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
