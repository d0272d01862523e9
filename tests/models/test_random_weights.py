"""Random-weight shapes: the right architecture, initialised everywhere, deterministic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import T5Config, T5EncoderModel

from hasten.errors import InputError, ModelError
from hasten.models import has_random_weights
from hasten.models.architecture import FLUX_1_DEV, shape_named
from hasten.models.random_weights import RandomTokenizer, activation_std, variance_preserving_


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_flux_1_dev_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        assert parameters(FluxTransformer2DModel(**FLUX_1_DEV.transformer)) == 11_901_408_320
        assert parameters(AutoencoderKL(**FLUX_1_DEV.vae)) == 83_819_683
        t5 = T5EncoderModel(T5Config(**FLUX_1_DEV.t5))
    assert parameters(t5) == 4_762_310_656


def test_linear_layers_keep_unit_variance() -> None:
    torch.manual_seed(0)
    layer = variance_preserving_(torch.nn.Linear(512, 512))
    assert layer(torch.randn(4096, 512)).std().item() == pytest.approx(1, abs=0.05)


def test_weights_and_ids_are_the_same_every_time(
    make_pipe: Callable[[], Any], call: Callable[..., torch.Tensor]
) -> None:
    assert torch.equal(call(make_pipe()), call(make_pipe()))


def test_building_leaves_the_global_generator_alone(make_pipe: Callable[[], Any]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_pipe()
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() == torch.float32


def test_the_pipeline_says_that_its_weights_are_random(pipe: Any) -> None:
    assert has_random_weights(pipe)
    assert 0.1 < activation_std(pipe.transformer)["output"] < 10


def test_activations_that_are_not_finite_are_named(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks[0].proj_out.bias.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"after single_transformer_blocks\.0 are not finite"):
        activation_std(pipe.transformer)


def test_token_ids_have_true_length_and_depend_on_the_prompt_alone() -> None:
    tokenizer = RandomTokenizer(1000, 77, end=999)
    ids = tokenizer(["a cat", "a dog"]).input_ids
    assert ids.shape == (2, 77)
    assert (ids[:, -1] == 999).all()
    assert not torch.equal(ids[0], ids[1])
    assert torch.equal(ids[1:], tokenizer("a dog").input_ids)
    assert tokenizer("a cat", padding="longest").input_ids.shape == (1, 3)


def test_an_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"use one of shape:flux\.1-dev"):
        shape_named("flux.9")
