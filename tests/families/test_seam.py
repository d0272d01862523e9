"""Families other than FLUX.1: one declared in a few lines, and pipelines that nobody declared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

import hasten
from hasten import Recipe, UnsupportedError, families
from hasten.families import family_of
from hasten.families.family import Stack
from hasten.machine import machine
from tests.families.fake import FAKE, FakePipeline, fake_pipe


def draw(pipe: Any, prompt: str = "a red kite", **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents: torch.Tensor = pipe(prompt, generator=generator, **arguments).images
    return latents


@pytest.fixture(autouse=True)
def _declared() -> Iterator[None]:
    before = dict(families._DECLARED)
    hasten.register_family("FakeTransformer", FAKE)
    yield
    families._DECLARED.clear()
    families._DECLARED.update(before)


@pytest.mark.parametrize(
    "sections",
    [
        {"cache": {"interval": 1}},
        {"cache": {"kind": "residual", "threshold": 1e-12, "warmup_steps": 1}},
        {"fuse": {}},
        {"fuse": {"conditioning": False}},
        {"compile": {"mode": "none", "cuda_graphs": "auto"}},
    ],
    ids=["planned", "residual", "table", "row by row", "graphs"],
)
def test_a_declared_family_draws_what_it_draws(sections: dict[str, Any]) -> None:
    expected = draw(fake_pipe())
    pipe = fake_pipe()
    fast = hasten.optimize(pipe, Recipe.from_dict(sections))
    for _ in range(2):
        torch.testing.assert_close(draw(fast), expected, rtol=1e-5, atol=1e-6)
    assert fast.held_bytes == 0, "without a reset by the pipeline, the end of the call ends the run"
    fast.restore()
    assert torch.equal(draw(pipe), expected)
    assert "forward" not in pipe.transformer.__dict__


def test_its_steps_are_skipped_and_counted() -> None:
    fast = hasten.optimize(
        fake_pipe(), Recipe.from_dict({"cache": {"start_step": 1, "interval": 2}})
    )
    plain = draw(fake_pipe())
    assert not torch.equal(draw(fast), plain)
    assert (fast.last_run.steps, fast.last_run.computed) == (6, 4)
    still = {"kind": "residual", "threshold": 1e9, "warmup_steps": 2, "max_consecutive": 1000}
    fast = hasten.optimize(fake_pipe(), Recipe.from_dict({"cache": still}))
    draw(fast)
    assert (fast.last_run.steps, fast.last_run.computed) == (6, 2)


def test_its_table_is_made_once_a_run() -> None:
    pipe = fake_pipe()
    hasten.optimize(pipe, Recipe.from_dict({"fuse": {}}))
    draw(pipe)
    draw(pipe, num_inference_steps=4)
    assert pipe.transformer.forward.constants.made == 2


def test_its_linears_are_quantised_but_for_the_modulations() -> None:
    pipe = fake_pipe()
    fast = hasten.optimize(pipe, Recipe.from_dict({"quantize": {"scheme": "int8"}}))
    assert "6 linears in int8" in fast.summary()
    plain = draw(fake_pipe())
    assert 0 < float((draw(fast) - plain).norm() / plain.norm()) < 0.02


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"fuse": {"kernels": "on"}}, "no fused kernels for fake"),
        ({"attention": {"backend": "math"}}, r"\[attention\] needs attention layers .* fake"),
        ({"engine": {"kind": "onnxruntime"}}, r"\[engine\] needs the parts of an export, and fake"),
    ],
)
def test_what_is_not_declared_is_named(sections: dict[str, Any], fault: str) -> None:
    pipe = fake_pipe()
    with pytest.raises(UnsupportedError, match=fault):
        hasten.optimize(pipe, Recipe.from_dict(sections))
    assert "forward" not in pipe.transformer.__dict__


def test_a_pipeline_without_a_transformer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="object has no transformer"):
        family_of(object())


def test_an_undeclared_class_says_so() -> None:
    del families._DECLARED["FakeTransformer"]
    family = family_of(fake_pipe())
    assert (family.declared, family.stacks) == (False, ())
    fast = hasten.optimize(fake_pipe(), Recipe.from_dict({"cache": {"interval": 2}}))
    assert "hasten has not been tested with FakeTransformer" in fast.notes
    with pytest.raises(
        UnsupportedError, match=r"\[quantize\] needs repeated blocks, and FakeTrans"
    ):
        hasten.optimize(fake_pipe(), Recipe.from_dict({"quantize": {"scheme": "int8"}}))
    assert isinstance(fast.pipe, FakePipeline)


# --- classes of Diffusers that nobody has declared ------------------------------------------------


def qwen_image() -> Any:
    """With true guidance: two calls a step, under names."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return QwenImagePipeline(scheduler, vae, None, None, transformer.eval())


def z_image() -> Any:
    """Lists go in and come out; no cache context; guidance by a batch of two."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=16,
        rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64],
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        scaling_factor=0.36, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0), vae, None, None, transformer.eval()
    )


def call(pipe: Any, **arguments: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    texts = [torch.randn(7, 16, generator=torch.Generator().manual_seed(s)) for s in (2, 3)]
    common: dict[str, Any] = {
        "height": 64, "width": 64, "num_inference_steps": 5, "output_type": "latent",
        "generator": torch.Generator().manual_seed(1), **arguments,
    }  # fmt: skip
    if isinstance(pipe, ZImagePipeline):
        text = {"prompt_embeds": texts[:1], "negative_prompt_embeds": texts[1:]}
        images = pipe(**text, guidance_scale=3.0, **common).images
    else:
        mask = torch.ones(1, 7, dtype=torch.long)
        images = pipe(
            prompt_embeds=texts[0][None], prompt_embeds_mask=mask,
            negative_prompt_embeds=texts[1][None], negative_prompt_embeds_mask=mask,
            true_cfg_scale=3.0, **common,
        ).images  # fmt: skip
    return images if isinstance(images, torch.Tensor) else torch.stack(list(images))


UNDECLARED = pytest.mark.parametrize("make", [qwen_image, z_image])


@UNDECLARED
def test_planned_caches_run_on_undeclared_pipelines(make: Any) -> None:
    expected = call(make())
    pipe = make()
    fast = hasten.optimize(pipe, Recipe.from_dict({"cache": {"interval": 1}}))
    assert torch.equal(call(fast), expected)
    fast.restore()
    fast = hasten.optimize(pipe, Recipe.from_dict({"cache": {"start_step": 1, "interval": 2}}))
    assert not torch.equal(call(fast), expected)
    assert (fast.last_run.steps, fast.last_run.computed) == (5, 3)
    assert fast.held_bytes == 0
    fast.restore()
    assert torch.equal(call(pipe), expected)


@UNDECLARED
def test_undeclared_pipelines_are_quantised(make: Any) -> None:
    expected = call(make())
    pipe = make()
    names = {name for name, _ in family_of(pipe).quantizable(pipe.transformer)}
    assert names
    assert not any("_mod." in name or "adaLN_modulation" in name for name in names)
    fast = hasten.optimize(pipe, Recipe.from_dict({"quantize": {"scheme": "int8"}}))
    assert 0 < float((call(fast) - expected).norm() / expected.norm()) < 0.05


@pytest.mark.slow
@pytest.mark.skipif(machine().compile_problem("cpu") is not None, reason="nothing to compile with")
@UNDECLARED
def test_undeclared_pipelines_are_compiled(make: Any) -> None:
    torch._dynamo.reset()
    expected = call(make(), num_inference_steps=2)
    fast = hasten.optimize(make(), Recipe.from_dict({"compile": {}}))
    got = call(fast, num_inference_steps=2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_the_residual_cache_wants_a_declaration() -> None:
    with pytest.raises(UnsupportedError, match="needs the blocks of QwenImage"):
        hasten.optimize(qwen_image(), Recipe.from_dict({"cache": {"kind": "residual"}}))
    stack = Stack("transformer_blocks", ("encoder_hidden_states", "hidden_states"))
    from hasten.families.family import Family

    hasten.register_family("QwenImageTransformer2DModel", Family("Qwen-Image", (stack,)))
    cache = {"kind": "residual", "threshold": 1e-12, "warmup_steps": 1}
    fast = hasten.optimize(qwen_image(), Recipe.from_dict({"cache": cache}))
    assert torch.equal(call(fast), call(qwen_image()))
