"""Calibration of pipelines that take an image, that start late, and that cannot be learned from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline
from PIL import Image

import hasten
from hasten.calibration.learn import SamplingRequest, sampling_request
from hasten.errors import InputError, ModelError
from hasten.prompts import prompt_hash
from hasten.recipe import ScheduleCache

PROMPTS = ["a red fox", "a kite", "word5 word9", "red word7"]
SMALL = {"height": 32, "width": 32, "max_sequence_length": 8}
FEW = {"held_back": 1, "batch": 2, "climb": 8}


@pytest.fixture
def image() -> Image.Image:
    ramp = torch.arange(32 * 32 * 3, dtype=torch.float32).remainder(251).to(torch.uint8)
    return Image.fromarray(ramp.view(32, 32, 3).numpy())


def as_a_user(request: SamplingRequest, call: Any) -> torch.Tensor:
    """The held-back prompt through the public interface."""
    last = len(request.prompts) - 1
    noise = [torch.Generator().manual_seed(request.seed + last)]
    found = call(
        prompt=[request.prompts[last]], generator=noise, output_type="latent", **request.arguments
    )
    latents: torch.Tensor = found.images
    return latents


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_late_start_is_learned_on_the_steps_that_it_runs(
    pipe: Any, image: Image.Image, strength: float
) -> None:
    late = FluxImg2ImgPipeline.from_pipe(pipe)
    arguments = {**SMALL, "image": image, "strength": strength}
    found = hasten.calibrate(late, PROMPTS, budget=3, steps=10, **FEW, **arguments)
    cache = found.recipe.cache
    assert isinstance(cache, ScheduleCache)
    assert cache.steps == round(10 * strength)
    assert found.recipe.name == f"schedule-3-of-{cache.steps}"
    assert found.better
    request = sampling_request(late, PROMPTS, 10, 0, 2, arguments)
    plain = as_a_user(request, late)
    begin = 10 - cache.steps
    run = late.scheduler.sigmas[begin:-1].tolist()
    assert cache.sigmas == pytest.approx(run, abs=1e-6), "the noise levels of the run itself"
    fast = hasten.optimize(late, found.recipe)
    error = (as_a_user(request, fast) - plain).norm() / plain.norm()
    assert fast.last_run.computed == 3
    assert float(error) == pytest.approx(found.error, rel=1e-3)


def test_a_budget_above_the_steps_of_a_late_start_is_refused(pipe: Any, image: Image.Image) -> None:
    late = FluxImg2ImgPipeline.from_pipe(pipe)
    arguments = {**SMALL, "image": image, "strength": 0.5}
    with pytest.raises(InputError, match="budget = 8 is not between 1 and the 5 steps of a run"):
        hasten.calibrate(late, PROMPTS, budget=8, steps=10, **FEW, **arguments)


@pytest.fixture
def kontext(pipe: Any) -> Any:
    """A pipeline whose first argument is not the prompt."""
    return FluxKontextPipeline.from_pipe(pipe)


def test_a_pipeline_whose_first_argument_is_an_image(kontext: Any, image: Image.Image) -> None:
    arguments = {**SMALL, "image": image, "max_area": 32 * 32, "_auto_resize": False}
    found = hasten.calibrate(kontext, PROMPTS, budget=2, steps=4, **FEW, **arguments)
    assert isinstance(found.recipe.cache, ScheduleCache)
    scales = hasten.calibrate_activations(kontext, PROMPTS[:1], steps=2, **arguments)
    assert scales.quantize is not None
    assert scales.quantize.amax


def test_a_pipeline_that_draws_another_size_says_so(kontext: Any, image: Image.Image) -> None:
    """Kontext scales what it draws to an area of its own."""
    arguments = {**SMALL, "image": image, "max_area": 64 * 64, "_auto_resize": False}
    with pytest.raises(InputError, match="size 32x32, but rendered another size") as caught:
        hasten.calibrate(kontext, PROMPTS, budget=2, steps=4, **FEW, **arguments)
    assert "max_area=1024" in caught.value.fix


def test_a_schedule_names_all_of_its_prompts(pipe: Any) -> None:
    found = hasten.calibrate(pipe, PROMPTS, budget=2, steps=4, **FEW, **SMALL)
    assert isinstance(found.recipe.cache, ScheduleCache)
    assert found.recipe.cache.prompts == tuple(map(prompt_hash, PROMPTS))
    assert hasten.Recipe.from_toml(found.recipe.to_toml()) == found.recipe


def test_runs_that_are_not_finite_teach_nothing(pipe: Any, tmp_path: Path) -> None:
    pipe.transformer.proj_out.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        hasten.calibrate(pipe, PROMPTS, budget=2, steps=4, state=tmp_path, **FEW, **SMALL)
    assert not list(tmp_path.glob("recording-*"))


Change = Callable[[Any, dict[str, Any]], Any]


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe, arguments: arguments["image"].putpixel((3, 3), (1, 2, 3)),
        lambda pipe, arguments: arguments["mask"].__setitem__((0, 500), 7.0),
        lambda pipe, arguments: arguments.update(strength=0.7),
        lambda pipe, arguments: pipe.scheduler.register_to_config(shift=2.0),
        lambda pipe, arguments: pipe.transformer.proj_out.weight.data.add_(1),
    ],
)
def test_whatever_a_recording_depends_on_is_in_its_key(
    pipe: Any, image: Image.Image, change: Change
) -> None:
    """By content: the text of a tensor leaves out most of its values, that of an image has none."""
    arguments = {"image": image, "mask": torch.zeros(1, 4096), "strength": 0.6}

    def key() -> dict[str, Any]:
        return sampling_request(pipe, PROMPTS, 4, 0, 2, arguments).key()

    before = key()
    arguments = {**arguments, "image": image.copy()}
    assert key() == before
    change(pipe, arguments)
    assert key() != before
