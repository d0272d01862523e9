"""One row, measured in a process of its own: `python -m hasten.benchmark.row JOB.json FD`.

Its progress goes to the file descriptor FD as JSON lines, its outcome to the file the job names.
Nothing of it outlives it: no patch, flag, compiled code or memory reaches the next row.
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
from hasten.benchmark.score import Told, score
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
    """Measure the job in `job_file`; whatever goes wrong becomes the row's status and reason."""
    quiet_libraries()
    job = Job.model_validate_json(Path(job_file).read_text("utf-8"))
    descriptor = int(progress_descriptor)
    os.set_inheritable(descriptor, False)

    def send(message: dict[str, Any]) -> None:
        os.write(descriptor, f"{json.dumps(message)}\n".encode())

    def tell(stage: str, done: int, total: int) -> None:
        send({"stage": stage, "done": done, "total": total})

    with forward_log(lambda line: send({"line": line}), lambda now: tell(f"load, {now}", 0, 1)):
        outcome = _outcome(job, tell)
    write_text(Path(job.outcome), outcome.model_dump_json())


def _outcome(job: Job, tell: Told) -> Outcome:
    try:
        return measure(job, import_module(job.engine), tell)
    except BrokenPipeError:  # nobody is waiting for this row any more
        raise
    except UnsupportedError as error:
        row = _unmeasured(job, "unsupported", _one_line(error))
        return Outcome(row=row, refusal=_refusal(job, error))
    except Exception as error:
        traceback.print_exc()
        row = _unmeasured(job, "failed", _one_line(error))
        return Outcome(row=row, refusal=_refusal(job, error))


def measure(job: Job, engine_module: Any, tell: Told) -> Outcome:
    """Measure the job's row in this process: its times and memory, then its quality."""
    device = torch.device(job.device)
    with cache_off():  # so that each image pays for its own prompt
        outcome, random_weights = _timed_row(job, device, engine_module, tell)
    gc.collect()  # the metrics need the memory that the model held
    if device.type == "cuda":
        torch.cuda.empty_cache()
    quality = _quality(job, device, random_weights, tell)
    row = outcome.row.model_copy(update={"quality": quality})
    return outcome.model_copy(update={"row": row})


class _WeightsChangedError(InputError):
    """The model's weights are not those that earlier rows were measured with."""


def _refusal(job: Job, error: Exception) -> Refusal | None:
    """The refusal that an error is to other rows too."""
    if isinstance(error, OSError) and error.errno in FULL:
        return Refusal(
            kind="HastenError",
            faults=(f"row {job.row}: {error.strerror}: its pictures could not be written",),
            fix="free some space there, then run the same command with --resume",
            final=True,
        )
    for kind in (ModelError, InputError, UnsupportedError):
        if isinstance(error, kind):
            final = isinstance(error, _WeightsChangedError)
            return Refusal(kind=kind.__name__, faults=error.faults, fix=error.fix, final=final)
    return None


def _timed_row(
    job: Job, device: torch.device, engine_module: Any, tell: Told
) -> tuple[Outcome, bool]:
    """The row without its quality, and whether its model has random weights.

    Setup is loading and optimising; the first image includes whatever compiles on first use. One
    more image warms up, then each prompt is rendered once, alone, between two synchronisations.
    """
    # Dynamo would otherwise give up compiling at its limit and go on uncompiled, silently.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    recipe = Recipe.from_toml(job.toml, source=job.row)
    settings = settings_of(recipe, job.workload)
    first = job.workload.prompts[0]

    tell("load", 0, 1)
    engine, setup_seconds = timed(device, engine_module.load_subject, job)
    _check_weights(job, engine.weights)
    tell("first image", 0, 1)
    _, first_seconds = timed(device, render_image, engine, first, settings)
    tell("warm up", 0, 1)
    render_image(engine, first, settings)
    reset_peak_memory(device)
    seconds, computed = render_all(engine, job, settings, tell)
    peak, counted = peak_memory(device)
    tell("time the transformer", 0, 1)
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
    """Where `results.json` finds the pictures that `render_all` has written."""
    prompts = () if job.images is None else job.workload.prompts
    return tuple(f"images/{job.row}/{prompt.id:03d}.png" for prompt in prompts)


def _check_weights(job: Job, weights: str | None) -> None:
    if job.weights is not None and weights not in (None, job.weights):
        raise _WeightsChangedError(
            f"the weights of {job.workload.model} (fingerprint {weights}) are not those that "
            f"earlier rows were measured with ({job.weights})",
            "choose another --out, or replace --resume by --overwrite to measure every row again",
        )


def _overlap(learned_on: Sequence[str] | None, job: Job) -> tuple[str, ...]:
    """How many prompts a learned schedule is scored on that it was learned on."""
    if learned_on is None:
        return ()
    if not learned_on:
        return ("its schedule does not name the prompts that it was learned on",)
    prompts = job.workload.prompts
    known = sum(prompt_hash(prompt.text) in learned_on for prompt in prompts)
    return (f"its schedule was learned on {known or 'none'} of these {len(prompts)} prompts",)


def _switched_off(recipe: Recipe) -> tuple[str, ...]:
    cached = recipe.text is not None and recipe.text.cache_mb > 0
    return ("cache of prompt embeddings off while timing",) if cached else ()


def _quality(
    job: Job, device: torch.device, random_weights: bool, tell: Told
) -> tuple[Quality, ...]:
    prompts = [prompt.id for prompt in job.workload.prompts]
    found = []
    for reference, folder in job.references.items():
        if random_weights:
            reason = "random weights: the pictures mean nothing"
            found.append(summarize_quality(reference, (), reason))
        elif folder is None:
            reason = f"the reference row {reference} has no pictures"
            found.append(summarize_quality(reference, (), reason))
        else:
            pair = (Path(job.floats), Path(folder))
            found.append(score(*pair, reference, prompts, device=device, tell=tell))
    if not job.keep_floats:
        shutil.rmtree(job.floats, ignore_errors=True)
    return tuple(found)


def _unmeasured(job: Job, status: Any, reason: str) -> Row:
    return Row(recipe=job.row, role=job.role, status=status, reason=reason, toml=job.toml)


def _one_line(error: Exception) -> str:
    if isinstance(error, HastenError):
        return "; ".join([*error.faults, *([f"fix: {error.fix}"] if error.fix else [])])
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return "torch.compile reached its recompile limit and would have gone on uncompiled"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    run_job(*sys.argv[1:])
