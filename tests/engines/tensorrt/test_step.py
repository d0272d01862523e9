"""The function that engines compute: the transformer's own, in other arguments."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from hasten.engines.tensorrt.manifest import Shapes
from hasten.engines.tensorrt.step import INPUTS, Step, sample
from hasten.errors import InputError
from hasten.step.modulations import Modulations
from tests.engines.tensorrt.conftest import FAMILY, SHAPES, unchanged_globals


@torch.no_grad()
def test_it_is_the_transformers_forward(transformer: Any) -> None:
    latents, text, pooled = torch.randn(1, 6, 16), torch.randn(1, 8, 24), torch.randn(1, 16)
    moment, guidance = torch.tensor([0.3]), torch.tensor([3.5])
    ids = torch.zeros(8, 3), torch.randint(0, 9, (6, 3)).float()
    expected = transformer(
        hidden_states=latents, encoder_hidden_states=text, pooled_projections=pooled,
        timestep=moment, guidance=guidance, txt_ids=ids[0], img_ids=ids[1], return_dict=False,
    )[0]  # fmt: skip
    conditioning = FAMILY.export.conditioning(transformer, moment, guidance, pooled, torch.float32)
    row = Modulations(FAMILY.modulated_norms(transformer)).rows(conditioning)
    embedded = transformer.context_embedder(text)
    step = Step(transformer, FAMILY)
    rotary = FAMILY.export.rotary(transformer, *ids)
    found = step(latents, embedded, row, *rotary)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (
        step(latents, embedded, row * 0.9, *FAMILY.export.rotary(transformer, *ids)) != found
    ).any()


def test_its_arguments_are_the_inputs_in_order() -> None:
    _, *names = inspect.signature(Step.forward).parameters
    assert tuple(names) == INPUTS
    assert tuple(SHAPES.dynamic()) == INPUTS


@torch.no_grad()
def test_it_reads_rows_in_the_copy_that_it_was_given(transformer: Any) -> None:
    step = Step(copy.deepcopy(transformer), FAMILY)
    assert not any("forward" in module.__dict__ for module in transformer.modules())
    readers = step.readers.readers
    assert {id(reader.linear) for reader in readers} <= {id(module) for module in step.modules()}
    assert len(readers) == len(FAMILY.modulated_norms(transformer)) == 4
    inputs = sample(transformer, FAMILY, SHAPES, 2, 3, torch.float32, seed=0)
    with pytest.raises(RuntimeError):
        step(**{**inputs, "latents": inputs["latents"][..., :-1]})
    assert [reader.row for reader in readers] == [None] * 4, "a failed call leaves no row bound"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_has_the_shapes_of_a_step(transformer: Any, dtype: torch.dtype) -> None:
    with unchanged_globals():
        inputs = sample(transformer, FAMILY, SHAPES, 2, 3, dtype, seed=5)
    width = Modulations(FAMILY.modulated_norms(transformer)).width
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == {
        "latents": (1, 6, 16),
        "text": (1, 8, 48),
        "row": (1, width),
        "cos": (14, 24),
        "sin": (14, 24),
    }
    kinds = {name: tensor.dtype for name, tensor in inputs.items()}
    rounded = dict.fromkeys(("latents", "text", "row"), dtype)
    assert kinds == {**rounded, "cos": torch.float32, "sin": torch.float32}
    again = sample(transformer, FAMILY, SHAPES, 2, 3, dtype, seed=5)
    assert all(torch.equal(tensor, again[name]) for name, tensor in inputs.items())
    other = sample(transformer, FAMILY, SHAPES, 2, 3, dtype, seed=6)
    assert not any(torch.equal(inputs[name], other[name]) for name in rounded)


def test_a_samples_tokens_are_in_rows(transformer: Any) -> None:
    inputs = sample(transformer, FAMILY, SHAPES, 2, 3, torch.float32, seed=0)
    places = [[0.0, y, x] for y in (0, 1) for x in (0, 1, 2)]
    cos, sin = FAMILY.export.rotary(transformer, torch.zeros(8, 3), torch.tensor(places))
    assert torch.equal(inputs["cos"], cos)
    assert torch.equal(inputs["sin"], sin)


def test_rows_can_be_made_once_the_linears_are_behind_readers(transformer: Any) -> None:
    before = sample(transformer, FAMILY, SHAPES, 2, 2, torch.float32, seed=0)
    step = Step(transformer, FAMILY)
    after = sample(step.transformer, FAMILY, SHAPES, 2, 2, torch.float32, seed=0)
    assert torch.equal(before["row"], after["row"])


def test_a_model_without_guidance_has_samples(transformer: Any) -> None:
    from diffusers import FluxTransformer2DModel

    plain = FluxTransformer2DModel(**{**transformer.config, "guidance_embeds": False})
    assert isinstance(plain, nn.Module)
    inputs = sample(plain, FAMILY, SHAPES, 2, 2, torch.float32, seed=0)
    assert inputs["row"].isfinite().all()


@pytest.mark.parametrize(
    "shapes", [(0, 1, 1, 1), (8, 0, 1, 1), (8, 2, 1, 4), (8, 2, 4, 3), (8, 1, 1, 1 << 21)]
)
def test_impossible_profiles_are_refused(shapes: tuple[int, int, int, int]) -> None:
    with pytest.raises(InputError, match="invalid profile"):
        Shapes(**dict(zip(("text", "least", "best", "most"), shapes, strict=True)))
