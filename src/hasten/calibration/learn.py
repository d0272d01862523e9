"""`hasten.calibrate`: learns a schedule for a pipeline from prompts, and returns it as a recipe."""

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
    image_distance,
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
POWERS = (1.0, 2.0)  # of a gap's error in the search cost; each gives a starting path
CLIMB = 120  # evaluations of the transformer, each on a batch of prompts
REACHES = (2, 4, 8)  # how far a climb moves a computed step; used in turn when one is exhausted
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """A learned schedule and its quality on held-back prompts.

    Attributes:
        recipe: A recipe with the schedule.
        interval: The plain interval cache with at least as many computed steps.
        error: Relative error of the schedule's final latents against the full run.
        interval_error: The same for `interval`.
        lpips: Mean LPIPS of the schedule's images against those of the full run.
        interval_lpips: The same for `interval`.
        objective: What the schedule was optimised for.
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
        """Whether the schedule is better than `interval` by its objective."""
        if self.objective == "lpips":
            return self.lpips < self.interval_lpips
        return self.error < self.interval_error


@dataclass(frozen=True)
class SamplingRequest:
    """A pipeline and how to sample it.

    Attributes:
        pipe: The plain pipeline.
        prompts: All prompts; an id is an index into them.
        seed: Prompt i has noise of seed `seed + i`.
        batch: Number of prompts per pipeline call.
        arguments: Of the pipeline call, including `num_inference_steps`, `height` and `width`.
    """

    pipe: Any
    prompts: Sequence[str]
    seed: int
    batch: int
    arguments: dict[str, Any]

    def run(self, call: Callable[..., Any], ids: Sequence[int]) -> Tensor:
        """The final latents of these prompts under `call`, P×tokens×channels."""
        noise = [torch.Generator("cpu").manual_seed(self.seed + i) for i in ids]
        arguments = dict(self.arguments)
        if isinstance(arguments.get("negative_prompt"), str):  # pipelines require one per prompt
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(ids)
        latents: Tensor = call(
            prompt=[self.prompts[i] for i in ids],
            generator=noise,
            output_type="latent",
            **arguments,
        ).images
        return latents

    def batches(self, ids: range) -> list[range]:
        """The ids of each call. An image's pixels can depend on the rest of its batch."""
        return [ids[first : first + self.batch] for first in range(0, len(ids), self.batch)]

    def run_all(self, call: Callable[..., Any], ids: range) -> Tensor:
        """The final latents of these prompts under `call`, in batches; P×D, float32, on the CPU."""
        parts = [self.run(call, batch) for batch in self.batches(ids)]
        return torch.cat(parts).flatten(1).float().cpu()

    def plain_run(self, ids: Sequence[int]) -> Tensor:
        """`run` with the plain pipeline.

        Raises:
            InputError: The pipeline renders another size than it is called with.
        """
        latents = self.run(self.pipe, ids)
        height, width = self.arguments["height"], self.arguments["width"]
        side = 2 * self.pipe.vae_scale_factor
        if latents.shape[1] != (height // side) * (width // side):
            raise InputError(
                f"the pipeline was called with size {width}x{height}, but rendered another size",
                f"call it with its size; FluxKontextPipeline takes max_area={width * height}",
            )
        return latents

    @contextmanager
    def optimized(self, cache: Cache) -> Iterator[OptimizedPipeline]:
        """Context manager that yields the pipeline optimised with a step cache."""
        fast: OptimizedPipeline = optimize(self.pipe, Recipe(cache=cache))
        try:
            yield fast
        finally:
            fast.restore()

    def objective(self, name: ObjectiveName, full: Trajectories) -> Objective:
        """The objective `name` for final latents of the prompts of `full`."""
        reference = full.latents[-1]
        if name == "latent":
            return relative_error(reference)
        height, width = self.arguments["height"], self.arguments["width"]
        return image_distance(self.pipe, reference, height, width)

    def key(self) -> dict[str, Any]:
        """Everything that recordings and trials depend on, as JSON values."""
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
    """A hash of an argument's content, which may include tensors and images."""
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
    if hasattr(value, "tobytes"):  # a Pillow image or numpy array
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
    """Learn which steps of a pipeline to compute.

    The pipeline is not modified. Deterministic for a given seed.

    Args:
        pipe: A plain pipeline.
        prompts: Prompts to learn from, then `held_back` to check on. For FLUX-like models, 16 and 8
            are enough.
        budget: Number of steps to compute, from 1 to `steps`.
        steps: Number of inference steps.
        objective: What to keep close to the full run: the final latents ("latent") or the image
            ("lpips").
        climb: Number of transformer evaluations, each on a batch of prompts, for refining the
            schedule.
        held_back: How many of the last prompts are used only to check the schedule.
        batch: Number of prompts per pipeline call.
        seed: Seed of the first prompt's noise; prompt i uses `seed + i`.
        state: A folder for intermediate results, from which a later call continues, even with
            another budget.
        progress: Called with the stage, the number of finished units and the total.
        **arguments: Further arguments of the pipeline call (height, guidance_scale, image …).

    Returns:
        The schedule and its quality on the held-back prompts.

    Raises:
        InputError: The budget is not from 1 to `steps`, there are too few prompts, or the state is
            damaged, belongs to another calibration, is in use or cannot be written.
        UnsupportedError: The pipeline's family is not supported.
        AlreadyOptimizedError: The pipeline is optimised.
        ModelError: The model's full runs are not finite.
    """
    report = progress or (lambda *_: None)
    check_held_back(held_back, len(prompts))
    check_budget(budget, steps)
    request = sampling_request(pipe, prompts, steps, seed, batch, arguments)
    learned, held = range(len(prompts))[:-held_back], range(len(prompts))[-held_back:]
    with open_store(
        state, request.key() | {"learned": len(learned), "objective": objective}
    ) as store:
        full, checked = _full_runs(request, learned, held, store, report)
        check_budget(budget, full.steps)  # a late start has fewer steps
        loss = request.objective(objective, full)
        best = search_plan(request, full, budget, loss, climb, store, report)
    return _checked(request, _schedule(request, full, best), objective, checked, held, report)


def _full_runs(
    request: SamplingRequest, learned: range, held: range, store: CalibrationStore, report: Progress
) -> tuple[Trajectories, Trajectories]:
    """Recordings of the prompts to learn from, and of the held-back prompts."""
    recorded = record(
        request.plain_run,
        request.pipe,
        [*request.batches(learned), *request.batches(held)],
        lambda done, total: report("record full runs", done, total),
        store,
    )
    return recorded.of(slice(0, held.start)), recorded.of(slice(held.start, None))


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
    report: Progress,
) -> Calibration:
    """The schedule with its errors, and those of the plain interval, on the held-back prompts."""
    budget, steps = len(schedule.compute), schedule.steps
    interval = _interval_of(budget, steps)
    losses = request.objective("latent", full), request.objective("lpips", full)
    report("check on held-back prompts", 0, 2)
    error, lpips = _held_back(request, schedule, losses, held)
    report("check on held-back prompts", 1, 2)
    interval_error, interval_lpips = _held_back(request, interval, losses, held)
    report("check on held-back prompts", 2, 2)
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
    report: Progress,
) -> Fitted:
    """Search a path on inner products, then improve it by the measured error of running plans."""

    def run(path: tuple[int, ...], order: int) -> Fitted:
        trial = store.trial(path, order)
        if trial is None:
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
            trial = Fitted(error, path, order, weights)
            store.keep_trial(trial)
        return trial

    costs = GapCosts(gram_matrix(full), full.sigmas)
    starts = dict.fromkeys(best_path(costs, full.steps, budget, power) for power in POWERS)
    pairs = [(path, order) for path in starts for order in ORDERS]
    fits = []
    for number, (path, order) in enumerate(pairs):
        report("fit", number, len(pairs))
        fits.append(run(path, order))
    best = min(fits, key=lambda fitted: fitted.error)
    tried = set(starts)
    trials = climb // budget
    for trial in range(trials):
        report("climb", trial, trials)
        candidates = _untried(best.path, full.steps, tried)
        if not candidates:
            break
        path = min(candidates, key=lambda path: path_cost(costs, path, full.steps))
        tried.add(path)
        best = min(best, run(path, best.order), key=lambda fitted: fitted.error)
    report("climb", trials, trials)
    return best


def _untried(
    path: tuple[int, ...], steps: int, tried: set[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Untried neighbours of `path`, at the smallest reach that has any."""
    for reach in REACHES:
        untried = [other for other in neighbours(path, steps, reach) if other not in tried]
        if untried:
            return untried
    return []


def _held_back(
    request: SamplingRequest, cache: Cache, losses: tuple[Objective, Objective], ids: range
) -> tuple[float, float]:
    """Both losses of the final latents of these prompts, sampled through the public API."""
    with request.optimized(cache) as fast:
        finals = request.run_all(fast, ids)
    return losses[0](finals), losses[1](finals)


def sampling_request(
    pipe: Any, prompts: Sequence[str], steps: int, seed: int, batch: int, arguments: dict[str, Any]
) -> SamplingRequest:
    """The plain pipeline with the resolved arguments of its call.

    Raises:
        UnsupportedError: The pipeline's family is not supported.
        AlreadyOptimizedError: The pipeline is optimised.
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
    """The interval plan (start 2) with the fewest computed steps that are at least `budget`."""
    start = min(2, budget)
    interval = max(1, (steps - start) // max(1, budget - start))
    return IntervalCache(start_step=start, interval=interval)
