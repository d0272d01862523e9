"""Calibration: each part against a direct computation, and the whole on a small pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten
from hasten.calibration.objective import decode_images
from hasten.calibration.search import (
    GapCosts,
    best_path,
    fit_weights,
    gram_matrix,
    neighbours,
    path_cost,
)
from hasten.calibration.store import Fitted
from hasten.calibration.trajectories import Trajectories, at_scheduler_step
from hasten.errors import InputError
from hasten.models.fingerprint import fingerprint
from hasten.passes.cache.plan import predicted
from hasten.passes.cache.predict import combine
from hasten.prompts import read_prompts
from hasten.quality import lpips
from hasten.recipe import ScheduleCache
from hasten.sealed import unseal


def curved(steps: int, seed: int = 0, prompts: int = 3, values: int = 40) -> Trajectories:
    """Smooth made-up runs: velocities quadratic in sigma, integrated by Euler's rule."""
    generator = torch.Generator().manual_seed(seed)
    sigmas = tuple(1 - i / steps for i in range(steps + 1))
    parts = torch.randn(3, prompts, values, generator=generator)
    velocities = torch.stack([parts[0] + s * parts[1] + s * s * parts[2] for s in sigmas[:-1]])
    latents = [torch.randn(prompts, values, generator=generator)]
    for i in range(steps):
        latents.append(latents[-1] + (sigmas[i + 1] - sigmas[i]) * velocities[i])
    return Trajectories(sigmas, velocities, torch.stack(latents))


def test_gap_errors_from_the_gram_matrix_are_the_real_ones() -> None:
    runs = curved(12)
    costs = GapCosts(gram_matrix(runs), runs.sigmas)
    coefficients = costs.error(9, (5, 3))
    error = torch.einsum("n,npd->pd", torch.from_numpy(coefficients).float(), runs.velocities)
    assert costs.norm(coefficients) == pytest.approx(float(error.square().mean().sqrt()), rel=1e-3)
    wanted = runs.latents[9] - runs.latents[5]
    made = error + wanted
    basis = runs.velocities[[5, 3]].flatten(1).T
    best = basis @ torch.linalg.lstsq(basis, wanted.flatten()).solution
    assert torch.allclose(made.flatten(), best, atol=2e-3)


@pytest.mark.parametrize("predictor", ["reuse", "linear", "damped"])
def test_gap_errors_of_a_predictor_are_what_a_plan_makes(predictor: str) -> None:
    """Against the plan itself, run step by step over a gap."""
    runs = curved(12)
    costs = GapCosts(gram_matrix(runs), runs.sigmas, predictor)
    error = torch.from_numpy(costs.error(9, (5, 3))).float()
    plan = predicted(runs.sigmas, [3, 5, 9], predictor)
    moved = torch.zeros_like(runs.latents[0])
    for step in range(5, 9):
        known = [runs.velocities[5], runs.velocities[3]]
        span = runs.sigmas[step + 1] - runs.sigmas[step]
        moved += span * combine(known, plan.weights[step])
    expected = moved - (runs.latents[9] - runs.latents[5])
    found = torch.einsum("n,npd->pd", error, runs.velocities)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_fitted_weights_reproduce_what_is_in_their_span() -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 200))
    gram = vectors @ vectors.T / 200
    target = np.array([0.0, 1.7, -0.7])
    assert fit_weights(gram, target, (1, 2)) == pytest.approx([1.7, -0.7], abs=1e-2)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), budget=st.integers(1, 5))
def test_the_search_finds_the_best_path_for_its_cost(seed: int, budget: int) -> None:
    """Against every path of a small problem, with the same conditional cost."""
    steps = 7
    runs = curved(steps, seed)
    costs = GapCosts(gram_matrix(runs), runs.sigmas)

    def cost(path: tuple[int, ...]) -> float:
        return path_cost(costs, path, steps)

    found = best_path(costs, steps, budget)
    assert len(found) == budget
    every = [(0, *rest) for rest in itertools.combinations(range(1, steps), budget - 1)]
    assert cost(found) <= min(map(cost, every)) * (1 + 1e-9) + 1e-12


@given(
    path=st.sets(st.integers(1, 19), max_size=12).map(lambda rest: (0, *sorted(rest))),
    reach=st.integers(1, 4),
)
def test_neighbours_are_paths_with_one_step_moved(path: tuple[int, ...], reach: int) -> None:
    for near in neighbours(path, 20, reach):
        assert near[0] == 0
        assert len(near) == len(path)
        assert list(near) == sorted(set(near))
        assert near[-1] < 20
        moved = [abs(a - b) for a, b in zip(path, near, strict=True) if a != b]
        assert len(moved) == 1
        assert moved[0] <= reach


def test_the_scheduler_is_left_as_it_was(pipe: Any, call: Callable[..., torch.Tensor]) -> None:
    expected = call(pipe)
    seen = []

    def watch(index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        seen.append(index)
        return velocity

    with at_scheduler_step(pipe.scheduler, watch):
        assert torch.equal(call(pipe), expected)
    assert seen == list(range(6))
    assert "step" not in pipe.scheduler.__dict__


@pytest.fixture(scope="module")
def learned() -> Any:
    pipe = hasten.load_pipeline("tiny", device="cpu", dtype="float32")
    prompts = read_prompts("tiny", limit=9)
    found = hasten.calibrate(pipe, prompts, budget=6, steps=14, held_back=3, batch=6, climb=24)
    return pipe, prompts, found


def test_a_learned_schedule_beats_the_interval_of_the_same_budget(learned: Any) -> None:
    pipe, _, found = learned
    cache = found.recipe.cache
    assert isinstance(cache, ScheduleCache)
    assert len(cache.compute) == 6
    assert cache.fingerprint == fingerprint(pipe.transformer)
    assert cache.expected_error == pytest.approx(found.error, abs=1e-6)
    assert found.better


def test_its_error_is_what_a_user_gets(learned: Any) -> None:
    """Sampled again through the public interface, on the held-back prompts."""
    pipe, prompts, found = learned
    ids = range(6, 9)

    def draw(target: Any) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(i) for i in ids]
        texts = [prompts[i] for i in ids]
        arguments = {"num_inference_steps": 14, "output_type": "latent"}
        return target(texts, generator=noise, **arguments).images.flatten(1)

    plain = hasten.optimize(pipe, "baseline")
    expected = draw(plain)
    plain.restore()
    fast = hasten.optimize(pipe, hasten.Recipe.from_toml(found.recipe.to_toml()))
    got = draw(fast)
    assert fast.last_run.computed == 6
    assert fast.calibrated is True
    fast.restore()
    error = ((got - expected).norm(dim=1) / expected.norm(dim=1)).mean()
    assert float(error) == pytest.approx(found.error, rel=1e-3)


def test_calibration_is_deterministic_and_leaves_the_pipeline_alone(learned: Any) -> None:
    pipe, prompts, found = learned
    again = hasten.calibrate(pipe, prompts, budget=6, steps=14, held_back=3, batch=6, climb=24)
    assert again.recipe == found.recipe
    hasten.optimize(pipe, "baseline").restore()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"budget": 0}, "budget = 0"),
        ({"budget": 13}, "budget = 13"),
        ({"budget": 3, "held_back": 0}, "held_back = 0"),
        ({"budget": 3, "held_back": 9}, "9 prompts are too few for held_back = 9"),
    ],
)
def test_bad_input(learned: Any, arguments: dict[str, Any], fault: str) -> None:
    pipe, prompts, _ = learned
    with pytest.raises(InputError, match=fault):
        hasten.calibrate(pipe, prompts, steps=12, **arguments)


def trials_in(folder: Path) -> list[Fitted]:
    content = unseal((folder / "calibration.json").read_bytes())
    return [
        Fitted(error, tuple(path), order, tuple(map(tuple, weights)))
        for error, path, order, weights in content["trials"]
    ]


class InterruptError(Exception):
    pass


def test_an_interrupted_calibration_goes_on_and_ends_the_same(learned: Any, tmp_path: Path) -> None:
    pipe, prompts, _ = learned
    few = {"budget": 3, "steps": 6, "held_back": 2, "batch": 2, "climb": 15}
    expected = hasten.calibrate(pipe, prompts[:6], **few)
    seen: list[str] = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(what)
        if (what, done) in {("record full runs", 2), ("climb", 3)} and what != resumed_at[-1]:
            resumed_at.append(what)
            raise InterruptError

    resumed_at = [""]
    for _ in range(2):
        with pytest.raises(InterruptError):
            hasten.calibrate(pipe, prompts[:6], **few, state=tmp_path, progress=stop)
    kept = trials_in(tmp_path)
    assert kept
    recordings = {path: path.stat().st_mtime_ns for path in tmp_path.glob("recording-*")}
    assert len(recordings) == 3
    again = hasten.calibrate(pipe, prompts[:6], **few, state=tmp_path)
    assert again == expected
    assert {path: path.stat().st_mtime_ns for path in recordings} == recordings
    assert trials_in(tmp_path)[: len(kept)] == kept
    with pytest.raises(InputError, match="another calibration: it differs in prompts"):
        hasten.calibrate(pipe, prompts[1:7], **few, state=tmp_path)


def test_pictures_are_decoded_as_the_pipeline_does(learned: Any) -> None:
    pipe, prompts, _ = learned
    arguments = {"num_inference_steps": 2, "height": 128, "width": 128}

    def draw(kind: str) -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return pipe(prompts[0], generator=noise, output_type=kind, **arguments).images

    pictures = decode_images(pipe, draw("latent").flatten(1), 128, 128)
    torch.testing.assert_close(pictures, draw("pt"), rtol=0, atol=1e-6)


def test_the_objective_is_what_a_trial_is_judged_by(learned: Any, tmp_path: Path) -> None:
    pipe, prompts, _ = learned
    few = {"budget": 3, "steps": 6, "held_back": 1, "batch": 2, "climb": 0}
    found = hasten.calibrate(pipe, prompts[:3], objective="lpips", state=tmp_path, **few)
    best = min(trials_in(tmp_path), key=lambda trial: trial.error)
    assert found.recipe.cache.compute == best.path
    fast = hasten.optimize(pipe, found.recipe)
    plain = {"num_inference_steps": 6, "output_type": "pt"}

    def draw(target: Any) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(i) for i in range(2)]
        return target(prompts[:2], generator=noise, **plain).images.clamp(0, 1)

    got = draw(fast)
    fast.restore()
    again = hasten.optimize(pipe, "baseline")
    wanted = draw(again)
    again.restore()
    assert lpips(got, wanted).mean().item() == pytest.approx(best.error, rel=1e-2)
