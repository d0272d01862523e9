"""Fusion changes nothing but the order of additions: the same latents for every argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image

import hasten
from hasten import CallError, Recipe, UnsupportedError
from hasten.families.flux1.fused import reasons_against
from hasten.kernels.norm_modulate import norm_modulate
from tests.test_apply import ARGUMENTS, fresh

Call = Callable[..., torch.Tensor]

KERNELS = Recipe.from_dict({"name": "kernels", "fuse": {"kernels": "on"}})
TABLE = Recipe.from_dict({"name": "table", "fuse": {"kernels": "off"}})
NO_TABLE = Recipe.from_dict({"name": "no-table", "fuse": {"conditioning": False}})
EVERY = pytest.mark.parametrize("recipe", [KERNELS, TABLE, NO_TABLE], ids=lambda r: r.name)


def close(left: Any, right: Any) -> bool:
    """Relative error of float32 rounding, or a 255th of a pixel."""
    if isinstance(left, torch.Tensor):
        return bool((left - right).norm() <= 1e-5 * right.norm())
    pictures = [
        torch.as_tensor(_array(one)) - torch.as_tensor(_array(other))
        for one, other in zip(left, right, strict=True)
    ]
    return all(bool((difference.abs() <= 1.01 / 255).all()) for difference in pictures)


def _array(picture: Any) -> Any:
    import numpy as np

    values = np.asarray(picture)
    return values / 255.0 if values.dtype == np.uint8 else values


@EVERY
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_latents_are_the_plain_pipelines(
    recipe: Recipe, name: str, pipe: Any, call: Call
) -> None:
    expected = call(pipe, **fresh(ARGUMENTS[name]))
    fast = hasten.optimize(pipe, recipe)
    assert close(call(fast, **fresh(ARGUMENTS[name])), expected)
    again = call(fast, prompt="another", seed=1)
    fast.restore()
    assert close(again, call(pipe, prompt="another", seed=1))
    assert type(pipe.transformer).forward == pipe.transformer.forward.__func__


def test_the_kernels_run(pipe: Any, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return norm_modulate(*arguments)

    monkeypatch.setattr("hasten.families.flux1.fused.norm_modulate", counted)
    call(hasten.optimize(pipe, KERNELS), num_inference_steps=2)
    blocks = (
        len(pipe.transformer.transformer_blocks),
        len(pipe.transformer.single_transformer_blocks),
    )
    assert len(calls) == 2 * (2 * blocks[0] + blocks[1] + 1)


def test_the_table_is_made_once_a_run_and_branch(pipe: Any, call: Call) -> None:
    fast = hasten.optimize(pipe, TABLE)
    constants = pipe.transformer.forward.constants
    call(fast)
    assert constants.made == 1
    call(fast, true_cfg_scale=2.0, negative_prompt="blurry")
    assert constants.made == 3
    call(fast, num_inference_steps=9)
    assert constants.made == 4


def test_each_row_is_what_the_step_would_compute(pipe: Any, call: Call) -> None:
    """The table against the modulation linears of the plain model, step by step, in float64."""
    pipe.transformer.to(torch.float64)
    steps: list[torch.Tensor] = []
    norm = pipe.transformer.single_transformer_blocks[1].norm
    hook = norm.linear.register_forward_hook(lambda *given: steps.append(given[2].clone()))
    embeds = [embedded.double() for embedded in pipe.encode_prompt("a fox", None)[:2]]
    arguments = {"prompt": None, "prompt_embeds": embeds[0], "pooled_prompt_embeds": embeds[1]}
    call(pipe, **arguments)
    hook.remove()
    fast = hasten.optimize(pipe, TABLE)
    rows: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda *_: rows.append(norm.linear(torch.zeros(1)).clone()))
    call(fast, **arguments)
    assert len(rows) == len(steps) == 6
    for row, step in zip(rows, steps, strict=True):
        torch.testing.assert_close(row, step, rtol=1e-10, atol=0)


def test_embeddings_swapped_in_mid_run_are_noticed(pipe: Any, call: Call) -> None:
    def swap(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            tensors["prompt_embeds"] = tensors["prompt_embeds"] + 1.0
        return tensors

    arguments = {
        "callback_on_step_end": swap,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    expected = call(pipe, **arguments)
    assert not close(expected, call(pipe))
    assert close(call(hasten.optimize(pipe, KERNELS), **arguments), expected)


def test_embeddings_changed_in_place_are_noticed(pipe: Any, call: Call) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            tensors["prompt_embeds"].add_(1.0)
        return {}

    arguments = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    expected = call(pipe, **arguments)
    assert close(call(hasten.optimize(pipe, KERNELS), **arguments), expected)


@EVERY
@pytest.mark.parametrize("strength", [0.34, 1.0])
def test_image_to_image_starts_late(recipe: Recipe, strength: float, pipe: Any, call: Call) -> None:
    other = FluxImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    arguments = {"image": Image.new("RGB", (32, 32), "red"), "strength": strength}
    expected = call(other, **arguments)
    fast = hasten.optimize(pipe, recipe).from_pipe(FluxImg2ImgPipeline)
    assert close(call(fast, **arguments), expected)


def test_a_call_outside_of_any_run(pipe: Any) -> None:
    """The transformer on its own, at a timestep that no schedule has."""
    inputs = {
        "hidden_states": torch.randn(1, 4, 64),
        "encoder_hidden_states": torch.randn(1, 3, 24),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.123]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    with torch.no_grad():
        expected = pipe.transformer(**inputs).sample
        hasten.optimize(pipe, KERNELS)
        assert close(pipe.transformer(**inputs).sample, expected)
        assert close(pipe.transformer(**inputs, return_dict=False)[0], expected)


@EVERY
def test_controlnet_residuals_run_under_the_table(recipe: Recipe, pipe: Any) -> None:
    inputs = {
        "hidden_states": torch.randn(1, 4, 64),
        "encoder_hidden_states": torch.randn(1, 3, 24),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.123]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "controlnet_block_samples": [torch.randn(1, 4, 32)],
    }
    with torch.no_grad():
        expected = pipe.transformer(**inputs).sample
        fast = hasten.optimize(pipe, recipe)
        assert close(pipe.transformer(**inputs).sample, expected)
    said = "1 call with controlnet_block_samples ran on the original blocks" in fast.summary()
    assert said == (recipe.fuse.kernels != "off")


@pytest.mark.parametrize("interval", [1, 3])
def test_under_a_step_cache(interval: int, pipe: Any, call: Call) -> None:
    cache = {"interval": interval, "start_step": 1}
    plain = hasten.optimize(pipe, Recipe.from_dict({"cache": cache}))
    expected = call(plain)
    plain.restore()
    fast = hasten.optimize(pipe, Recipe.from_dict({"cache": cache, "fuse": {"kernels": "on"}}))
    assert close(call(fast), expected)
    assert fast.last_run.computed == (6 if interval == 1 else 3)


def test_a_copy_leaves_the_original_alone(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = hasten.optimize(pipe, KERNELS, copy=True)
    assert close(call(fast), expected)
    assert torch.equal(call(pipe), expected)


def test_merged_weights_are_shared_with_the_layers(pipe: Any) -> None:
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    hasten.optimize(pipe, KERNELS)
    attn = pipe.transformer.single_transformer_blocks[0].attn
    proj = pipe.transformer.single_transformer_blocks[0].proj_mlp
    assert len({w.weight.untyped_storage().data_ptr() for w in (attn.to_q, attn.to_v, proj)}) == 1
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_weights_replaced_after_optimising_are_noticed(pipe: Any, call: Call) -> None:
    fast = hasten.optimize(pipe, KERNELS)
    call(fast)
    attn = pipe.transformer.transformer_blocks[0].attn
    attn.to_q = torch.nn.Linear(32, 32)
    with pytest.raises(CallError, match="was replaced after the pipeline was optimised"):
        call(fast)
    fast.restore()
    call(pipe)


def test_what_the_kernels_cannot_run(make_pipe: Callable[[], Any]) -> None:
    pipe = make_pipe()
    pipe.transformer.transformer_blocks[1].attn.to_q = torch.nn.Sequential()
    reasons = reasons_against(pipe.transformer)
    assert reasons == [
        "transformer_blocks.1: linears with the same input are of different kinds, "
        "Linear and Sequential: quantize.skip must match all of them, or the whole block"
    ]
    with pytest.raises(UnsupportedError, match=r"fuse\.kernels = \"on\": transformer_blocks\.1"):
        hasten.optimize(pipe, KERNELS)
    fast = hasten.optimize(pipe, Recipe.from_dict({"fuse": {}}))
    assert "unchanged: the blocks: transformer_blocks.1: linears" in fast.summary()
    assert any("fuse: the blocks unchanged: transformer_blocks.1" in note for note in fast.notes)


def test_half_precision_is_left_to_the_original_blocks(pipe: Any) -> None:
    pipe.transformer.to(torch.float16)
    reasons = reasons_against(pipe.transformer)
    assert reasons == ["float16 overflows in them: pass --dtype bfloat16, or float32"]


def test_int8_products_on_the_kernels(pipe: Any, call: Call) -> None:
    """Other codes than the original blocks': there every row is rounded to float32 first."""
    quantize = {"quantize": {"scheme": "int8"}}
    blocks = hasten.optimize(pipe, Recipe.from_dict(quantize), copy=True)
    expected, plain = call(blocks), call(pipe)
    fast = hasten.optimize(pipe, Recipe.from_dict({"fuse": {"kernels": "on"}, **quantize}))
    got = call(fast)
    assert "fused kernels, int8 products" in fast.summary()
    assert (got - expected).norm() < 0.01 * expected.norm()
    assert 1e-5 < (got - plain).norm() / plain.norm() < 0.05


def test_bfloat16_fp8_products_on_the_kernels(pipe: Any, call: Call) -> None:
    if not hasten.machine.machine().fp8_on_cpu:
        pytest.skip("no FP8 product on this CPU")
    pipe.to(dtype=torch.bfloat16)
    expected = call(pipe).float()
    quantize = {"scheme": "fp8"}
    fast = hasten.optimize(
        pipe, Recipe.from_dict({"fuse": {"kernels": "on"}, "quantize": quantize})
    )
    got = call(fast).float()
    assert "fused kernels, FP8 products" in fast.summary()
    assert 1e-4 < float((got - expected).norm() / expected.norm()) < 0.1
