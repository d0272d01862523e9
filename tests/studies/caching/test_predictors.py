"""Filling skipped steps from outside, against what the engine itself does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from studies.caching.predictors import (
    CANDIDATES,
    Ground,
    Known,
    Mode,
    markdown,
    paths_of,
    residual_cache,
    weighted,
)
from torch import Tensor

import hasten
from hasten.calibration.trajectories import Trajectories, at_scheduler_step
from hasten.recipe import Recipe, ScheduleCache

STEPS = 6
PATH = (0, 1, 3)


def run(pipe: Any) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    embedded = {
        "prompt_embeds": torch.zeros(1, 8, 24),
        "pooled_prompt_embeds": torch.zeros(1, 16),
    }
    with torch.inference_mode():
        latents: Tensor = pipe(
            **embedded, width=32, height=32, num_inference_steps=STEPS, generator=generator,
            output_type="latent",
        ).images  # fmt: skip
    return latents


def ground(pipe: Any) -> Ground:
    run(pipe)
    sigmas = tuple(pipe.scheduler.sigmas.tolist())
    torch.manual_seed(0)
    velocities = torch.randn(STEPS, 1, 8)
    return Ground(PATH, sigmas, Trajectories(sigmas, velocities, torch.randn(STEPS + 1, 1, 8)))


@pytest.mark.parametrize(("name", "predictor"), [("reuse", "reuse"), ("linear in σ", "linear")])
def test_filling_at_the_scheduler_is_what_the_engine_does(
    pipe: Any, name: str, predictor: Any
) -> None:
    rows = CANDIDATES[name](ground(pipe))
    plan = ScheduleCache(steps=STEPS, compute=PATH, predictor=predictor)
    fast = hasten.optimize(pipe, Recipe(cache=plan))
    own = run(fast)
    fast.restore()
    bare = hasten.optimize(pipe, Recipe(cache=plan.model_copy(update={"predictor": "reuse"})))
    with at_scheduler_step(pipe.scheduler, Known(PATH, rows)):
        torch.testing.assert_close(run(bare), own, rtol=1e-4, atol=1e-5)


def test_every_candidate_weighs_every_step(pipe: Any) -> None:
    here = ground(pipe)
    for weights in CANDIDATES.values():
        rows = weights(here)
        assert len(rows) == STEPS
        assert all(len(row) <= sum(step <= i for step in PATH) for i, row in enumerate(rows))


def test_a_residual_cache_that_skips_nothing_changes_nothing(pipe: Any) -> None:
    plain = run(pipe)
    with residual_cache(pipe, range(STEPS), [(1.0,)] * STEPS):
        assert torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe), plain)


def test_a_skipped_step_of_a_residual_cache_runs_no_block(pipe: Any) -> None:
    calls = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with residual_cache(pipe, PATH, [(1.0,)] * STEPS):
        run(pipe)
    assert len(calls) == len(PATH)


def test_the_mode_of_an_exponential_run_is_exact() -> None:
    sigmas = [1.0, 0.8, 0.7, 0.4, 0.3]
    shape = torch.rand(2, 3, 4) + 0.1
    rates = torch.tensor([1.5, -0.5]).view(2, 1, 1)
    mode = Mode((0, 1), sigmas)
    made = [mode(i, shape * (rates * sigmas[i]).exp(), shape) for i in range(4)]
    torch.testing.assert_close(made[3], shape * (rates * sigmas[3]).exp())


def test_weights_beyond_the_known_velocities_are_left_out() -> None:
    assert torch.equal(weighted([torch.ones(2)], (2.0, 5.0)), torch.full((2,), 2.0))


def test_steps_are_the_learned_ones_and_evenly_spaced_ones(tmp_path: Path) -> None:
    text = "[cache]\nkind = 'schedule'\nsteps = 50\ncompute = [0, 7]\n"
    (tmp_path / "tiny-50-2.toml").write_text(text, "utf-8")
    assert paths_of(tmp_path, "tiny", [2, 5]) == {
        "learned 2": (0, 7),
        "even 2": (0, 25),
        "even 5": (0, 10, 20, 30, 40),
    }


def test_the_table_has_the_least_in_bold() -> None:
    rows = {"reuse": {"even 2": {"error": 0.2, "lpips": 0.1}},
            "linear": {"even 2": {"error": 0.1, "lpips": 0.3}}}  # fmt: skip
    text = markdown({"model": "tiny", "held": 2, "learn": 2, "paths": {"even 2": []}, "rows": rows})
    assert "| reuse | 0.2000 |\n| linear | **0.1000** |" in text
    assert "| reuse | **0.1000** |\n| linear | 0.3000 |" in text
