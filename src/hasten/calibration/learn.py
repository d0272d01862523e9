"""`hasten.calibrate`: from a pipeline and some prompts to a recipe with a learned schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.apply import optimize
from hasten.calibration.closed_loop import fit_closed_loop
from hasten.calibration.inputs import check_budget, check_held_back
from hasten.calibration.objective import (
    Objective,
    ObjectiveName,
    picture_distance,
    relative_error,
)
from hasten.calibration.search import (
    GapCosts,
    best_path,
    gram_matrix,
    neighbours,
    path_cost,
)
from hasten.calibration.store import CalibrationStore, Fitted, open_store
from hasten.calibration.trajectories import Trajectories, record
from hasten.check import refuse_optimized
from hasten.errors import InputError
from hasten.families import family_of
from hasten.models.fingerprint import fingerprint
from hasten.pipeline import OptimizedPipeline
from hasten.prompts import prompt_hash
from hasten.recipe import Cache, IntervalCache, Recipe, ScheduleCache
from hasten.settings import Settings

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
class SamplingRequest:
    """A pipeline and how to sample it: prompt i gets the noise of seed + i.

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
        arguments = dict(self.arguments)
        if isinstance(arguments.get("negative_prompt"), str):  # pipelines want one per prompt
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(ids)
        latents: Tensor = call(
            prompt=[self.prompts[i] for i in ids],
            generator=noise,
            output_type="latent",
            **arguments,
        ).images
        return latents

    def batches(self, ids: range) -> list[range]:
        """Ids of each call. Image pipelines draw differently in other company."""
        return [ids[first : first + self.batch] for first in range(0, len(ids), self.batch)]

    def run_all(self, call: Callable[..., Any], ids: range) -> Tensor:
        """Final latents of these prompts, in batches; P×D, float32, on the CPU."""
        parts = [self.run(call, batch) for batch in self.batches(ids)]
        return torch.cat(parts).flatten(1).float().cpu()

    def plain_run(self, ids: Sequence[int]) -> Tensor:
        """`run` of the plain pipeline.

        Raises:
            InputError: The pipeline does not draw the size that it is called with.
        """
        latents = self.run(self.pipe, ids)
        height, width = self.arguments["height"], self.arguments["width"]
        side = 2 * self.pipe.vae_scale_factor
        if latents.shape[1] != (height // side) * (width // side):
            raise InputError(
                f"the pipeline was called for {width}x{height} and drew another size",
                f"call it for what it draws; FluxKontextPipeline takes max_area={width * height}",
            )
        return latents

    @contextmanager
    def optimized(self, cache: Cache) -> Iterator[OptimizedPipeline]:
        """The pipeline under a step cache, while the block runs."""
        fast: OptimizedPipeline = optimize(self.pipe, Recipe(cache=cache))
        try:
            yield fast
        finally:
            fast.restore()

    def objective(self, name: ObjectiveName, full: Trajectories) -> Objective:
        """Judges final latents of the prompts that `full` recorded."""
        reference = full.latents[-1]
        if name == "latent":
            return relative_error(reference)
        height, width = self.arguments["height"], self.arguments["width"]
        return picture_distance(self.pipe, reference, height, width)

    def key(self) -> dict[str, Any]:
        """What recordings and trials depend on, as JSON values."""
        scheduler = self.pipe.scheduler
        return {
            "fingerprint": fingerprint(self.pipe.transformer),
            "pipeline": type(self.pipe).__name__,
            "dtype": str(self.pipe.dtype),
            "device": str(self.pipe._execution_device.type),
            "scheduler": [type(scheduler).__name__, _identity(dict(scheduler.config))],
            "prompts": _identity(list(self.prompts)),
            "seed": self.seed,
            "batch": self.batch,
            "arguments": {name: _identity(self.arguments[name]) for name in sorted(self.arguments)},
        }


def _identity(value: Any) -> str:
    """A hash of a call's argument by what is in it; tensors and images may be among it."""
    digest = hashlib.sha256(type(value).__name__.encode())
    if isinstance(value, Mapping):
        digest.update(_identity([[name, value[name]] for name in sorted(value)]).encode())
    elif isinstance(value, list | tuple):
        for part in value:
            digest.update(_identity(part).encode())
    else:
        digest.update(_content(value))
    return digest.hexdigest()


def _content(value: Any) -> bytes:
    if isinstance(value, Tensor):
        shape = f"{value.dtype}{tuple(value.shape)}".encode()
        return shape + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    if hasattr(value, "tobytes"):  # an image of Pillow, an array of numpy
        kind = [getattr(value, name, "") for name in ("mode", "size", "dtype", "shape")]
        content: bytes = repr(kind).encode() + value.tobytes()
        return content
    return repr(value).encode()


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
    """Learn which steps to compute on a pipeline, which stays as it was. Deterministic per seed.

    Args:
        pipe: A plain pipeline.
        prompts: 16 to learn from and 8 to check on are enough for FLUX-like models.
        budget: How many steps of a run to compute.
        steps: `num_inference_steps` of the pipeline's call.
        objective: Whether to keep the final latents close to the full run's, or the image (LPIPS).
        climb: Transformer evaluations, each of a batch of prompts, to refine the schedule with.
        held_back: How many of the last prompts only check what the others taught.
        batch: Prompts per call.
        seed: Seed of the first prompt's noise; each prompt's is one higher.
        state: A folder from which a later call continues, also with another budget.
        progress: Called with the stage, the units done and their number.
        **arguments: Of the pipeline's call (height, width, guidance_scale, image …).

    Raises:
        InputError: A budget outside 1…steps, too few prompts, or a state that is damaged, of
            another calibration, in use, or cannot be written.
        ModelError: The model's full runs are not finite.
    """
    show = progress or (lambda *_: None)
    check_held_back(held_back, len(prompts))
    check_budget(budget, steps)
    request = request_of(pipe, prompts, steps, seed, batch, arguments)
    learned, held = range(len(prompts))[:-held_back], range(len(prompts))[-held_back:]
    with open_store(
        state, request.key() | {"learned": len(learned), "objective": objective}
    ) as store:
        full, checked = _full_runs(request, learned, held, store, show)
        check_budget(budget, full.steps)  # a late start has fewer of them
        judge = request.objective(objective, full)
        best = search_plan(request, full, budget, judge, climb, store, show)
    return _checked(request, _schedule(request, full, best), objective, checked, held, show)


def _full_runs(
    request: SamplingRequest, learned: range, held: range, store: CalibrationStore, show: Progress
) -> tuple[Trajectories, Trajectories]:
    """Recordings of the prompts to learn from, and of those to check on."""
    every = record(
        request.plain_run,
        request.pipe,
        [*request.batches(learned), *request.batches(held)],
        lambda done, total: show("record full runs", done, total),
        store,
    )
    return every.of(slice(0, held.start)), every.of(slice(held.start, None))


def _schedule(request: SamplingRequest, full: Trajectories, best: Fitted) -> ScheduleCache:
    return ScheduleCache(
        steps=full.steps,
        compute=best.path,
        weights=best.weights,
        sigmas=tuple(round(sigma, 6) for sigma in full.sigmas[:-1]),
        fingerprint=fingerprint(request.pipe.transformer),
        prompts=tuple(map(prompt_hash, request.prompts)),
    )


def _checked(
    request: SamplingRequest,
    schedule: ScheduleCache,
    objective: ObjectiveName,
    full: Trajectories,
    held: range,
    show: Progress,
) -> Calibration:
    """The schedule and its errors on held-back prompts, with those of the plain interval."""
    budget, steps = len(schedule.compute), schedule.steps
    interval = _interval_of(budget, steps)
    judges = request.objective("latent", full), request.objective("lpips", full)
    show("check on held-back prompts", 0, 2)
    error, lpips = _held_back(request, schedule, judges, held)
    show("check on held-back prompts", 1, 2)
    interval_error, interval_lpips = _held_back(request, interval, judges, held)
    show("check on held-back prompts", 2, 2)
    recipe = Recipe(
        name=f"schedule-{budget}-of-{steps}",
        description=f"{budget} of {steps} steps, learned on {held.start} prompts",
        cache=ScheduleCache(**{**dict(schedule), "expected_error": round(error, 6)}),
    )
    return Calibration(recipe, interval, error, interval_error, lpips, interval_lpips, objective)


def search_plan(
    request: SamplingRequest,
    full: Trajectories,
    budget: int,
    objective: Objective,
    climb: int,
    store: CalibrationStore,
    show: Progress,
) -> Fitted:
    """Search on inner products, then climb from there by what a plan really gives when it runs."""

    def run(path: tuple[int, ...], order: int) -> Fitted:
        known = store.trial(path, order)
        if known is None:
            with request.optimized(
                ScheduleCache(steps=full.steps, compute=path, predictor="reuse")
            ) as fast:
                weights, error = fit_closed_loop(
                    lambda ids: request.run(fast, ids),
                    request.pipe.scheduler,
                    full,
                    path,
                    order=order,
                    batch=request.batch,
                    objective=objective,
                )
            known = Fitted(error, path, order, weights)
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


def _held_back(
    request: SamplingRequest, cache: Cache, judges: tuple[Objective, Objective], ids: range
) -> tuple[float, float]:
    """What both say of the final latents of these prompts, sampled as a user would."""
    with request.optimized(cache) as fast:
        finals = request.run_all(fast, ids)
    return judges[0](finals), judges[1](finals)


def request_of(
    pipe: Any, prompts: Sequence[str], steps: int, seed: int, batch: int, arguments: dict[str, Any]
) -> SamplingRequest:
    """The plain pipeline with the arguments that a call of it would have.

    Raises:
        UnsupportedError: The pipeline is of no supported family.
        AlreadyOptimizedError: It is optimised.
    """
    plain = pipe.pipe if type(pipe) is OptimizedPipeline else pipe
    family_of(plain)
    refuse_optimized(plain)
    defaults = Settings.for_call(plain, None)
    side = plain.default_sample_size * plain.vae_scale_factor
    size = {"height": side, "width": side}
    call = {**size, **defaults, **arguments, "num_inference_steps": steps}
    return SamplingRequest(plain, prompts, seed, batch, call)


def _interval_of(budget: int, steps: int) -> IntervalCache:
    """The interval plan (start 2) that computes at least as many steps, and as few as it can."""
    start = min(2, budget)
    interval = max(1, (steps - start) // max(1, budget - start))
    return IntervalCache(start_step=start, interval=interval)
