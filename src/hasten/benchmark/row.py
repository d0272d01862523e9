"""Measures one row in its own process: `python -m hasten.benchmark.row JOB.json FD`.

Progress is written to the file descriptor FD as JSON lines, and the outcome to the file that the
job names. A separate process ensures that no patch, flag, compiled code or memory affects the next
row.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import statistics
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config

from hasten.atomic import write_text
from hasten.benchmark.job import Job, Outcome, Refusal
from hasten.benchmark.plan import settings_of
from hasten.benchmark.render import denoise_seconds, render_all, render_image
from hasten.benchmark.score import Progress, score
from hasten.benchmark.timer import peak_memory, reset_peak_memory, storage_bytes, timed
from hasten.errors import HastenError, InputError, ModelError, UnsupportedError
from hasten.log import forward_log, quiet_libraries
from hasten.passes.text.embeddings import cache_off
from hasten.prompts import prompt_hash
from hasten.recipe import Recipe
from hasten.results import (
    Quality,
    Row,
    StepsComputed,
    summarize_quality,
    summarize_seconds,
)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_job(job_file: str, progress_descriptor: str) -> None:
    """Measure the job in `job_file`. Errors become the row's status and reason."""
    quiet_libraries()
    job = Job.model_validate_json(Path(job_file).read_text("utf-8"))
    descriptor = int(progress_descriptor)
    os.set_inheritable(descriptor, False)

    def send(message: dict[str, Any]) -> None:
        os.write(descriptor, f"{json.dumps(message)}\n".encode())

    def progress(stage: str, done: int, total: int) -> None:
        send({"stage": stage, "done": done, "total": total})

    with forward_log(lambda line: send({"line": line}), lambda now: progress(f"load, {now}", 0, 1)):
        outcome = _outcome(job, progress)
    write_text(Path(job.outcome), outcome.model_dump_json())


def _outcome(job: Job, progress: Progress) -> Outcome:
    try:
        return measure(job, import_module(job.engine), progress)
    except BrokenPipeError:  # the parent has ended
        raise
    except UnsupportedError as error:
        row = _unmeasured(job, "unsupported", _one_line(error))
        return Outcome(row=row, refusal=_refusal(job, error))
    except Exception as error:
        traceback.print_exc()
        row = _unmeasured(job, "failed", _one_line(error))
        return Outcome(row=row, refusal=_refusal(job, error))


def measure(job: Job, engine_module: Any, progress: Progress) -> Outcome:
    """Measure the job's row in this process: its times and memory, then its quality.

    Args:
        job: What to measure.
        engine_module: Module with a function `load_subject(job)`.
        progress: Called with the stage, the number of finished units and the total.
    """
    device = torch.device(job.device)
    with cache_off():  # so that the time of each image includes its text encoding
        outcome, random_weights = _timed_row(job, device, engine_module, progress)
    gc.collect()  # the metrics need the model's memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    quality = _quality(job, device, random_weights, progress)
    row = outcome.row.model_copy(update={"quality": quality})
    return outcome.model_copy(update={"row": row})


class _WeightsChangedError(InputError):
    """The model's weights differ from those of earlier rows."""


def _refusal(job: Job, error: Exception) -> Refusal | None:
    """The refusal for an error that would affect other rows as well; None for other errors."""
    if isinstance(error, OSError) and error.errno in FULL:
        return Refusal(
            kind="HastenError",
            faults=(f"row {job.row}: {error.strerror}: its images could not be written",),
            fix="free some space there, then run the same command with --resume",
            final=True,
        )
    for kind in (ModelError, InputError, UnsupportedError):
        if isinstance(error, kind):
            final = isinstance(error, _WeightsChangedError)
            return Refusal(kind=kind.__name__, faults=error.faults, fix=error.fix, final=final)
    return None


def _timed_row(
    job: Job, device: torch.device, engine_module: Any, progress: Progress
) -> tuple[Outcome, bool]:
    """The row without its quality, and whether its model has random weights.

    Setup is loading and optimising. The first image includes compilation on first use. A second
    image is a warm-up. Then each prompt is rendered once, one at a time, between two
    synchronisations.
    """
    # At its recompile limit, Dynamo would otherwise continue uncompiled without an error.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    recipe = Recipe.from_toml(job.toml, source=job.row)
    settings = settings_of(recipe, job.workload)
    first = job.workload.prompts[0]

    progress("load", 0, 1)
    engine, setup_seconds = timed(device, engine_module.load_subject, job)
    _check_weights(job, engine.weights)
    progress("first image", 0, 1)
    _, first_seconds = timed(device, render_image, engine, first, settings)
    progress("warm up", 0, 1)
    render_image(engine, first, settings)
    reset_peak_memory(device)
    seconds, computed = render_all(engine, job, settings, progress)
    peak, counted = peak_memory(device)
    progress("time the transformer", 0, 1)
    step_seconds = denoise_seconds(engine, first, settings, device) / settings.steps
    row = Row(
        recipe=job.row,
        role=job.role,
        status="ok",
        notes=(
            *engine.fast.notes,
            counted,
            *_switched_off(recipe),
            *_overlap(engine.learned_on, job),
        ),
        calibrated=engine.fast.calibrated,
        seconds_per_image=summarize_seconds(seconds),
        transformer_ms_per_step=1000 * step_seconds,
        steps_computed=StepsComputed(
            mean=statistics.fmean(computed), min=min(computed), max=max(computed)
        ),
        setup_seconds=setup_seconds,
        first_image_seconds=first_seconds,
        peak_memory_bytes=peak,
        weights_bytes=storage_bytes(engine.pipe.components.values()),
        images=_image_paths(job),
        toml=job.toml,
    )
    return Outcome(row=row, weights=engine.weights), engine.random_weights


def _image_paths(job: Job) -> tuple[str, ...]:
    """The paths in `results.json` of the images that `render_all` has written."""
    prompts = () if job.images is None else job.workload.prompts
    return tuple(f"images/{job.row}/{prompt.id:03d}.png" for prompt in prompts)


def _check_weights(job: Job, weights: str | None) -> None:
    if job.weights is not None and weights not in (None, job.weights):
        raise _WeightsChangedError(
            f"the weights of {job.workload.model} (fingerprint {weights}) differ from those of "
            f"earlier rows ({job.weights})",
            "choose another --out, or replace --resume by --overwrite to measure every row again",
        )


def _overlap(learned_on: Sequence[str] | None, job: Job) -> tuple[str, ...]:
    """A note on how many of the workload's prompts the schedule was learned on."""
    if learned_on is None:
        return ()
    if not learned_on:
        return ("its schedule does not record the prompts that it was learned on",)
    prompts = job.workload.prompts
    known = sum(prompt_hash(prompt.text) in learned_on for prompt in prompts)
    return (f"its schedule was learned on {known or 'none'} of these {len(prompts)} prompts",)


def _switched_off(recipe: Recipe) -> tuple[str, ...]:
    cached = recipe.text is not None and recipe.text.cache_mb > 0
    return ("the cache of prompt embeddings was off while timing",) if cached else ()


def _quality(
    job: Job, device: torch.device, random_weights: bool, progress: Progress
) -> tuple[Quality, ...]:
    prompts = [prompt.id for prompt in job.workload.prompts]
    quality = []
    for reference, folder in job.references.items():
        if random_weights:
            reason = "random weights: image quality is meaningless"
            quality.append(summarize_quality(reference, (), reason))
        elif folder is None:
            reason = f"the reference row {reference} has no images"
            quality.append(summarize_quality(reference, (), reason))
        else:
            pair = (Path(job.floats), Path(folder))
            quality.append(score(*pair, reference, prompts, device=device, progress=progress))
    if not job.keep_floats:
        shutil.rmtree(job.floats, ignore_errors=True)
    return tuple(quality)


def _unmeasured(job: Job, status: Any, reason: str) -> Row:
    return Row(recipe=job.row, role=job.role, status=status, reason=reason, toml=job.toml)


def _one_line(error: Exception) -> str:
    if isinstance(error, HastenError):
        return "; ".join([*error.faults, *([f"fix: {error.fix}"] if error.fix else [])])
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return "torch.compile reached its recompile limit, after which it runs uncompiled"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    run_job(*sys.argv[1:])
