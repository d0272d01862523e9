"""An engine without a model: pictures from noise, and every way in which a row can go wrong.

What it does is written in the recipe's description.
"""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import torch

from hasten.benchmark.job import Job
from hasten.errors import ModelError, UnsupportedError
from hasten.log import logger
from hasten.passes.cache.plan import computed_steps
from hasten.prompts import prompt_hash, read_prompts
from hasten.recipe import Recipe

LEAK = "HASTEN_TEST_LEAK"
WEIGHTS = "HASTEN_TEST_WEIGHTS"
LEARNED_ON: dict[str, tuple[str, ...]] = {
    "learned on the first": (prompt_hash(read_prompts("general")[0]), "ffffffffffff"),
    "learned on others": ("ffffffffffff",),
    "learned on unknown": (),
}


class Pipe:
    """Of a family that nobody has declared: its text is encoded in each call."""

    def __init__(self) -> None:
        self.transformer = torch.nn.Linear(8, 4)
        self.components = {"transformer": self.transformer, "scheduler": object()}


class Fast:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.notes = (recipe.description,)
        self.calibrated: bool | None = None
        self.last_run = SimpleNamespace(steps=0, computed=0, skipped=0)
        self.calls = 0

    def __call__(self, prompt: str | None = None, **given: Any) -> SimpleNamespace:
        self.calls += 1
        _misbehave(self.recipe.description, self.calls)
        steps = given["num_inference_steps"]
        computed = computed_steps(self.recipe.cache, steps) if self.recipe.cache else steps
        if computed is None:  # it decides as it goes: by the prompt, here
            computed = steps // 2 + len(prompt or "") % 2
        self.last_run = SimpleNamespace(steps=steps, computed=computed, skipped=steps - computed)
        time.sleep(0.001 * computed)
        size = (1, 3, given["height"], given["width"])
        image = torch.rand(size, generator=given["generator"])
        image = (image + 0.01 * (steps - computed) + len(prompt or "") / 1000).clamp(0, 1)
        if self.recipe.description == "nan" and self.calls > 2:
            image[0, 0, 0, 0] = float("nan")
        return SimpleNamespace(images=image)


def load_subject(job: Job) -> SimpleNamespace:
    recipe = Recipe.from_toml(job.toml)
    if job.workload.model == "owner/missing":
        raise ModelError("owner/missing: no such model", "give another")
    if recipe.description == "unsupported":
        raise UnsupportedError("no compiler", "install one")
    if recipe.description == "leak and die":
        os.environ[LEAK] = "1"
        torch.set_default_dtype(torch.float64)
    logger.info("export     1.0 s")
    logger.debug("tracing")
    if recipe.description == "find the leak":
        assert LEAK not in os.environ
        assert torch.get_default_dtype() is torch.float32
    return SimpleNamespace(
        pipe=Pipe(),
        fast=Fast(recipe),
        random_weights=job.row == "random",
        weights=os.environ.get(WEIGHTS, "0123456789abcdef") or None,
        learned_on=LEARNED_ON.get(recipe.description),
    )


def _misbehave(how: str, calls: int) -> None:
    if how == "fail" and calls == 3:
        raise ValueError("first line\nsecond line")
    if how == "leak and die" and calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wait" and calls == 4 and "HASTEN_TEST_WAIT" in os.environ:
        time.sleep(60)
    if how == "recompile":
        _recompile()


def _recompile() -> None:
    @torch.compile(backend="eager", dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    for length in range(1, 20):
        double(torch.ones(length + 1))
