"""Loads a model with a recipe, renders its images and measures their times."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hasten.apply import optimize
from hasten.benchmark.job import Job
from hasten.benchmark.plan import settings_of
from hasten.benchmark.score import Progress, save_floats, write_png
from hasten.benchmark.timer import timed
from hasten.errors import HastenError
from hasten.families import family_of
from hasten.models import has_random_weights, load_pipeline
from hasten.models.fingerprint import fingerprint
from hasten.recipe import BudgetCache, Recipe, ScheduleCache
from hasten.results import Prompt
from hasten.schedules import nearest_schedule
from hasten.settings import Settings

DENOISE_RUNS = 3
DENOISE_SECONDS = 5.0  # no further run is started after this time


class Subject(NamedTuple):
    """The pipeline that a row measures.

    Attributes:
        pipe: The plain pipeline.
        fast: The optimised pipeline; called like `pipe`, and has `last_run` and `notes`.
        random_weights: Whether the weights are random, so that image quality is meaningless.
        weights: Fingerprint of all weights; None if it cannot be computed.
        learned_on: Hashes of the prompts that the recipe's schedule was learned on; empty if it
            does not have them; None without a learned schedule.
    """

    pipe: Any
    fast: Any
    random_weights: bool
    weights: str | None = None
    learned_on: tuple[str, ...] | None = None


def load_subject(job: Job) -> Subject:
    """Load the job's model and apply its recipe."""
    pipe = load_pipeline(job.workload.model, device=job.device, dtype=job.workload.dtype)
    pipe.set_progress_bar_config(disable=True)
    recipe = Recipe.from_toml(job.toml, source=job.row)
    weights = weights_of(pipe)
    learned_on = _learned_on(recipe, pipe, settings_of(recipe, job.workload).steps)
    fast = optimize(pipe, recipe, force=job.force)
    return Subject(pipe, fast, has_random_weights(pipe), weights, learned_on)


def weights_of(pipe: Any) -> str | None:
    """A fingerprint of the weights and settings of all components.

    The transformer alone is not enough: another decoder, text encoder or scheduler changes the
    images, too. None if a component has no fingerprint.
    """
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        config = getattr(part, "config", {})
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        public = {key: value for key, value in settings.items() if not key.startswith("_")}
        digest.update(json.dumps([name, public], sort_keys=True, default=str).encode())
        if isinstance(part, nn.Module):
            try:
                digest.update(fingerprint(_Parameters(part.named_parameters)).encode())
            except Exception:  # quantised and offloaded weights raise various errors
                return None
    return digest.hexdigest()[:16]


class _Parameters(NamedTuple):
    """The part of a module that `fingerprint` reads; settings are hashed separately."""

    named_parameters: Callable[[], Iterator[tuple[str, Tensor]]]
    config: Mapping[str, Any] = {}


def _learned_on(recipe: Recipe, pipe: Any, steps: int) -> tuple[str, ...] | None:
    cache = recipe.cache
    if isinstance(cache, BudgetCache):
        cache = nearest_schedule(fingerprint(pipe.transformer), min(cache.budget, steps), steps)
    if not isinstance(cache, ScheduleCache) or cache.fingerprint is None:
        return None
    return cache.prompts or ()


def render_image(engine: Any, prompt: Prompt, settings: Settings) -> Tensor:
    """Render one image.

    Its noise is generated on the CPU, so that it is the same on every device.

    Returns:
        3×H×W in [0, 1], on the pipeline's device.
    """
    arguments = _call_arguments(prompt, settings)
    image: Tensor = engine.fast(prompt=prompt.text, output_type="pt", **arguments).images[0]
    return image


def render_all(
    engine: Any, job: Job, settings: Settings, progress: Progress
) -> tuple[list[float], list[int]]:
    """Render each prompt once, one at a time, and write the images to the job's folders.

    Writing is outside the timed region.

    Returns:
        Seconds per image, and number of computed steps per image.

    Raises:
        HastenError: An image is not finite, and the weights are not random.
    """
    device = torch.device(job.device)
    prompts = job.workload.prompts
    seconds, computed = [], []
    for done, prompt in enumerate(prompts):
        progress("render", done, len(prompts))
        image, elapsed = timed(device, render_image, engine, prompt, settings)
        seconds.append(elapsed)
        computed.append(engine.fast.last_run.computed)
        if job.images is not None:
            _keep(image, prompt, job, Path(job.images), engine.random_weights)
    progress("render", len(prompts), len(prompts))
    return seconds, computed


def denoise_seconds(engine: Any, prompt: Prompt, settings: Settings, device: torch.device) -> float:
    """Median seconds of the sampling loop, without decoding and without text encoding.

    If the family does not declare how to encode text separately, text encoding is included. The
    median is over three runs, or as many (at least one) as start within five seconds.
    """
    encode = family_of(engine.pipe).encode
    text = {"prompt": prompt.text}
    if encode is not None:
        text = encode(engine.pipe, prompt.text, settings.max_sequence_length)

    def denoise() -> None:
        engine.fast(**text, output_type="latent", **_call_arguments(prompt, settings))

    seconds: list[float] = []
    while len(seconds) < DENOISE_RUNS and sum(seconds) < DENOISE_SECONDS:
        seconds.append(timed(device, denoise)[1])
    return statistics.median(seconds)


def _call_arguments(prompt: Prompt, settings: Settings) -> dict[str, Any]:
    return {
        "generator": torch.Generator("cpu").manual_seed(prompt.seed),
        **settings.call_arguments(),
    }


def _keep(image: Tensor, prompt: Prompt, job: Job, images: Path, random_weights: bool) -> None:
    if random_weights:
        image = image.nan_to_num(0)
    elif not image.isfinite().all():
        raise HastenError(f"image {prompt.id} has values that are not finite")
    image = image.float().clamp(0, 1)
    write_png(images / f"{prompt.id:03d}.png", image)
    if job.references or job.keep_floats:
        save_floats(Path(job.floats), prompt.id, image)
