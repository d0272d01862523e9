"""Parity: an optimised pipeline is called like the plain one and, computing every step, is it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import hasten
from hasten import AlreadyOptimizedError, CallError, OptimizedPipeline, Recipe, UnsupportedError

Call = Callable[..., torch.Tensor]

EVERY_STEP = Recipe.from_dict({"name": "every-step", "cache": {"interval": 1}})
SPARSE = Recipe.from_dict({"name": "sparse", "cache": {"start_step": 1, "interval": 3}})
LINEAR = Recipe.from_dict(
    {"name": "linear", "cache": {"start_step": 2, "interval": 3, "predictor": "linear"}}
)


def peak_bytes(fast: Any) -> int:
    """Most bytes that the step cache kept of a run at once."""
    return int(fast._optimization.chain.layer("cache").peak_bytes)


def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * (0.9 if step == 1 else 1.0)}


ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"prompt": ["a cat", "a dog"]},
    "images per prompt": {"num_images_per_prompt": 3},
    "generators": {
        "prompt": ["a cat", "a dog"],
        "generator": [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)],
    },
    "other steps": {"num_inference_steps": 9},
    "one step": {"num_inference_steps": 1},
    "other size": {"height": 48, "width": 64},
    "second prompt": {"prompt_2": "in the snow"},
    "guidance": {"guidance_scale": 1.5},
    "true cfg": {"true_cfg_scale": 3.0, "negative_prompt": "blurry"},
    "true cfg off": {"true_cfg_scale": 1.0, "negative_prompt": "blurry"},
    "attention kwargs": {"joint_attention_kwargs": {"scale": 0.5}},
    "sigmas": {"sigmas": np.linspace(1.0, 0.2, 5), "num_inference_steps": None},
    "callback": {"callback_on_step_end": callback},
    "pictures": {"output_type": "np"},
    "pil": {"output_type": "pil"},
    "tuple": {"return_dict": False},
    "longer text": {"max_sequence_length": 24},
}


def fresh(arguments: dict[str, Any]) -> dict[str, Any]:
    """Generators are consumed by a call: hand out new ones in the same state."""
    arguments = dict(arguments)
    if "generator" in arguments:
        arguments["generator"] = [
            torch.Generator().manual_seed(g.initial_seed()) for g in arguments["generator"]
        ]
    return arguments


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    return all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_step_computed_is_bit_equal_to_the_plain_pipeline(
    name: str, pipe: Any, call: Call
) -> None:
    expected = call(pipe, **fresh(ARGUMENTS[name]))
    fast = hasten.optimize(pipe, EVERY_STEP)
    assert same(call(fast, **fresh(ARGUMENTS[name])), expected)
    run = fast.last_run
    branches = 2 if name == "true cfg" else 1
    assert run.steps == run.computed == run.stored // branches
    assert same(call(fast, **fresh(ARGUMENTS[name])), expected), "the second call differs"
    fast.restore()
    assert same(call(pipe, **fresh(ARGUMENTS[name])), expected), "restore() left something behind"


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("recipe", [SPARSE, LINEAR], ids=lambda recipe: recipe.name)
def test_cached_calls_depend_on_their_arguments_alone(
    recipe: Recipe, name: str, pipe: Any, call: Call
) -> None:
    """No state leaks: other calls in between change nothing, nor does who calls."""
    fast = hasten.optimize(pipe, recipe)
    first = call(fast, **fresh(ARGUMENTS[name]))
    for other in ("batch", "other size", "true cfg"):
        call(fast, **fresh(ARGUMENTS[other]), seed=1)
    assert same(call(fast, **fresh(ARGUMENTS[name])), first)
    assert same(call(pipe, **fresh(ARGUMENTS[name])), first), "called on the pipeline itself"


def reference_sampler(pipe: Any, recipe: Recipe, steps: int, **arguments: Any) -> torch.Tensor:
    """The cache written out as a sampling loop, with nothing of the engine in it."""
    assert recipe.cache is not None
    embeds, pooled, text_ids = pipe.encode_prompt("a red fox", None, max_sequence_length=8)
    generator = torch.Generator().manual_seed(0)
    latents, ids = pipe.prepare_latents(1, 16, 32, 32, torch.float32, "cpu", generator)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    shift = 0.5 + (1.15 - 0.5) / (4096 - 256) * (latents.shape[1] - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
    known: list[tuple[float, torch.Tensor]] = []
    for step, timestep in enumerate(scheduler.timesteps):
        start, interval = recipe.cache.start_step, recipe.cache.interval
        sigma = float(scheduler.sigmas[step])
        if step < start or (step - start) % interval == 0:
            velocity = pipe.transformer(
                hidden_states=latents,
                timestep=timestep.expand(1) / 1000,
                guidance=torch.full([1], 3.5),
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )[0]
            known.append((sigma, velocity))
        elif recipe.cache.predictor == "reuse" or len(known) < 2:
            velocity = known[-1][1]
        else:
            (s0, v0), (s1, v1) = known[-2:]
            velocity = v1 + (v1 - v0) / (s1 - s0) * (sigma - s1)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("recipe", [SPARSE, LINEAR], ids=lambda recipe: recipe.name)
def test_a_cached_run_is_the_sampler_it_claims_to_be(recipe: Recipe, pipe: Any, call: Call) -> None:
    with torch.no_grad():
        expected = reference_sampler(pipe, recipe, 10)
    fast = hasten.optimize(pipe, recipe)
    torch.testing.assert_close(
        call(fast, num_inference_steps=10, guidance_scale=3.5), expected, rtol=1e-5, atol=1e-5
    )


def test_steps_are_counted_and_the_transformer_really_rests(pipe: Any, call: Call) -> None:
    calls = []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    fast = hasten.optimize(pipe, "cache")
    call(fast, num_inference_steps=50)
    assert len(calls) == fast.last_run.computed == 18
    assert fast.last_run.skipped == 32
    assert "18 of 50 steps computed" in fast.summary()
    calls.clear()
    call(fast, num_inference_steps=50, true_cfg_scale=2.0, negative_prompt="blurry")
    assert len(calls) == 36
    assert fast.last_run.computed == 18


def test_a_batch_is_its_items(pipe: Any, call: Call) -> None:
    fast = hasten.optimize(pipe, SPARSE)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = call(fast, ["a cat", "a dog"], generator=generators)
    for row, (prompt, seed) in enumerate([("a cat", 3), ("a dog", 4)]):
        alone = call(fast, prompt, seed=seed)
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-4)


class BoomError(Exception):
    pass


def test_an_exception_in_mid_run_leaves_no_state(pipe: Any, call: Call) -> None:
    def explode(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise BoomError
        return {}

    fast = hasten.optimize(pipe, SPARSE)
    expected = call(fast)
    for victim in (fast, pipe):
        with pytest.raises(BoomError):
            call(victim, seed=5, callback_on_step_end=explode)
        assert torch.equal(call(victim), expected)
    assert not fast.held_bytes


def test_an_interrupt_in_mid_run(make_pipe: Callable[[], Any], call: Call) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return {}

    plain = call(make_pipe(), callback_on_step_end=stop)
    fast = hasten.optimize(make_pipe(), EVERY_STEP)
    assert torch.equal(call(fast, callback_on_step_end=stop), plain)
    assert fast.last_run.steps == 3
    complete = call(fast)
    assert torch.equal(complete, call(make_pipe()))


def test_two_pipelines_in_one_process_do_not_share_state(
    make_pipe: Callable[[], Any], call: Call
) -> None:
    """The second one runs whole inside every step of the first."""
    one, two = make_pipe(), make_pipe()
    fast_one, fast_two = hasten.optimize(one, SPARSE), hasten.optimize(two, LINEAR)
    alone_one, alone_two = call(fast_one, seed=1), call(fast_two, seed=2)
    inner = []

    def nested(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inner.append(call(fast_two, seed=2))
        return {}

    assert torch.equal(call(fast_one, seed=1, callback_on_step_end=nested), alone_one)
    assert len(inner) == 6
    assert all(torch.equal(latents, alone_two) for latents in inner)


def test_pipelines_sharing_a_transformer_interleave(pipe: Any, call: Call) -> None:
    fast = hasten.optimize(pipe, SPARSE)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other = fast.from_pipe(FluxPipeline, scheduler=scheduler)
    alone, alone_other = call(fast, seed=1), call(other, seed=2, num_inference_steps=9)
    inner = []

    def nested(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inner.append(call(other, seed=2, num_inference_steps=9))
        return {}

    assert torch.equal(call(fast, seed=1, callback_on_step_end=nested), alone)
    assert all(torch.equal(latents, alone_other) for latents in inner)


def test_a_foreign_scheduler_is_noticed(pipe: Any, call: Call) -> None:
    fast = hasten.optimize(pipe, SPARSE)
    expected = call(fast)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    stranger = FluxPipeline.from_pipe(pipe, scheduler=scheduler)
    with pytest.raises(CallError, match="outside a sampling run"):
        call(stranger)

    def nested(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        call(stranger)
        return {}

    with pytest.raises(CallError, match="another pipeline"):
        call(fast, callback_on_step_end=nested)
    assert torch.equal(call(fast), expected)


@pytest.mark.parametrize("strength", [0.34, 0.6, 1.0])
def test_image_to_image_starts_late(pipe: Any, call: Call, strength: float) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    arguments = {"image": image, "strength": strength, "num_inference_steps": 9}
    plain = FluxImg2ImgPipeline.from_pipe(pipe)
    late = 9 - int(9 - 9 * strength)
    expected = call(plain, **arguments)
    fast = hasten.optimize(pipe, EVERY_STEP)
    assert torch.equal(call(plain, **arguments), expected), "a plain from_pipe pipeline"
    twin = fast.from_pipe(FluxImg2ImgPipeline)
    assert torch.equal(call(twin, **arguments), expected)
    assert twin.last_run.steps == late
    fast.restore()
    sparse = hasten.optimize(pipe, SPARSE).from_pipe(FluxImg2ImgPipeline)
    first = call(sparse, **arguments)
    assert torch.equal(call(sparse, **arguments), first)
    assert sparse.last_run.computed == sum(step % 3 == 1 or step < 1 for step in range(late))


def test_a_replaced_scheduler_is_followed(make_pipe: Callable[[], Any], call: Call) -> None:
    plain, pipe = make_pipe(), make_pipe()
    fast = hasten.optimize(pipe, EVERY_STEP)
    for victim in (plain, fast):
        victim.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            victim.scheduler.config, use_dynamic_shifting=False, shift=2.0
        )
    assert torch.equal(call(fast), call(plain))


def test_a_second_order_scheduler(make_pipe: Callable[[], Any], call: Call) -> None:
    plain, pipe = make_pipe(), make_pipe()
    for victim in (plain, pipe):
        victim.scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    arguments = {"height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 8}
    generator = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    try:
        expected = plain("a", **arguments, num_inference_steps=4, generator=generator()).images
    except (ValueError, TypeError) as error:
        pytest.skip(f"this Diffusers cannot drive FluxPipeline with it: {error}")
    fast = hasten.optimize(pipe, EVERY_STEP)
    got = fast("a", **arguments, num_inference_steps=4, generator=generator()).images
    assert torch.equal(got, expected)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.integers(1, 8),
    start=st.integers(0, 9),
    interval=st.integers(1, 9),
    predictor=st.sampled_from(["reuse", "linear"]),
    batch=st.integers(1, 2),
    size=st.sampled_from([16, 32, 48]),
)
def test_any_plan_computes_what_it_says(
    pipe: Any,
    call: Call,
    steps: int,
    start: int,
    interval: int,
    predictor: str,
    batch: int,
    size: int,
) -> None:
    arguments = {"num_inference_steps": steps, "width": size, "prompt": ["a fox"] * batch}
    recipe = Recipe.from_dict(
        {"cache": {"start_step": start, "interval": interval, "predictor": predictor}}
    )
    expected = call(pipe, **arguments)
    fast = hasten.optimize(pipe, recipe)
    try:
        got = call(fast, **arguments)
        assert fast.last_run.steps == steps
        assert torch.isfinite(got).all()
        if fast.last_run.computed == steps:
            assert torch.equal(got, expected)
    finally:
        fast.restore()


def test_a_custom_loop_over_the_pipelines_scheduler_works(pipe: Any) -> None:
    hasten.optimize(pipe, SPARSE)
    with torch.no_grad():
        latents = reference_sampler_with_own_scheduler(pipe)
    assert torch.isfinite(latents).all()


def reference_sampler_with_own_scheduler(pipe: Any) -> torch.Tensor:
    embeds, pooled, text_ids = pipe.encode_prompt("a", None, max_sequence_length=8)
    latents, ids = pipe.prepare_latents(1, 16, 32, 32, torch.float32, "cpu", None)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5), mu=0.5)
    for timestep in pipe.scheduler.timesteps:
        output = pipe.transformer(
            latents, embeds, pooled, timestep.expand(1) / 1000, ids, text_ids, torch.ones(1)
        )
        latents = pipe.scheduler.step(output.sample, timestep, latents).prev_sample
    return latents


def test_the_cache_holds_one_output_a_branch_and_predictor_point(pipe: Any, call: Call) -> None:
    fast = hasten.optimize(pipe, LINEAR)
    call(fast)
    one_output = 4 * 64 * 4  # 2×2 patches of 32×32 px at 8×: 4 tokens × 64 channels, float32
    assert peak_bytes(fast) == 2 * one_output


def test_a_copy_shares_weights_and_leaves_the_original_alone(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = hasten.optimize(pipe, SPARSE, copy=True)
    cached = call(fast)
    assert not torch.equal(cached, expected)
    assert torch.equal(call(pipe), expected)
    assert torch.equal(call(fast), cached)
    theirs = dict(pipe.transformer.named_parameters())
    for name, parameter in fast.pipe.transformer.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr()
    assert fast.pipe.transformer.transformer_blocks[0] is not pipe.transformer.transformer_blocks[0]


def test_optimising_twice_raises(pipe: Any) -> None:
    fast = hasten.optimize(pipe, "cache")
    for victim in (pipe, fast, FluxImg2ImgPipeline.from_pipe(pipe)):
        with pytest.raises(AlreadyOptimizedError, match="recipe 'cache'"):
            hasten.optimize(victim, "baseline")
    fast.restore()
    assert isinstance(hasten.optimize(pipe, "baseline"), OptimizedPipeline)


def test_sampling_defaults_yield_to_the_caller(pipe: Any, call: Call) -> None:
    recipe = Recipe.from_dict(
        {"sampling": {"steps": 4, "size": "48x32", "guidance": 2.0, "max_sequence_length": 8}}
    )
    fast = hasten.optimize(pipe, recipe)
    latents = fast("a", output_type="latent").images
    assert latents.shape[1] == 6
    assert fast.last_run.steps == 4
    assert fast.last_run.computed == 4
    assert call(fast, num_inference_steps=3).shape[1] == 4
    assert fast.last_run.steps == 3
    fast("a", output_type="latent", sigmas=np.linspace(1, 0.5, 2))
    assert fast.last_run.steps == 2


def test_attributes_are_the_pipelines(pipe: Any) -> None:
    fast = hasten.optimize(pipe, "baseline")
    assert fast.vae is pipe.vae
    replacement = FlowMatchEulerDiscreteScheduler()
    fast.scheduler = replacement
    assert pipe.scheduler is replacement
    with pytest.raises(AttributeError):
        _ = fast.no_such_thing
    assert "baseline" in repr(fast)
    assert "nothing changed" in fast.summary()


def test_a_recipe_that_cannot_run_here_leaves_the_pipeline_as_it_was(
    pipe: Any, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = call(pipe)
    monkeypatch.setattr("hasten.apply.cache_steps", lambda *_: (_ for _ in ()).throw(BoomError))
    with pytest.raises(BoomError):
        hasten.optimize(pipe, "cache-compile")
    assert all(b._compiled_call_impl is None for b in pipe.transformer.transformer_blocks)
    assert torch.equal(call(pipe), expected)
    with pytest.raises(UnsupportedError, match="needs an accelerator"):
        hasten.optimize(pipe, Recipe.from_dict({"offload": {"kind": "model"}}))
    hasten.optimize(pipe, "baseline")


def test_diffusers_own_cache_is_not_stacked_on(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedError, match="Diffusers' own caches"):
        hasten.optimize(pipe, "cache")
