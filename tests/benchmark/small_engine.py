"""The real engine around the small random pipeline of conftest, whose pictures count as real."""

from __future__ import annotations

import torch

from hasten.apply import optimize
from hasten.benchmark.job import Job
from hasten.benchmark.render import Subject, weights_of
from hasten.models.random_weights import build_shape
from hasten.recipe import Recipe
from tests.conftest import SMALL


def load_subject(job: Job) -> Subject:
    pipe = build_shape(SMALL, torch.device(job.device), torch.float32)
    weights = weights_of(pipe)
    fast = optimize(pipe, Recipe.from_toml(job.toml), force=job.force)
    return Subject(pipe, fast, random_weights=False, weights=weights)
