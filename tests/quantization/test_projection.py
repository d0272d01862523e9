"""Merged linears: one product, the same values, the same memory, and a note of what was merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hasten
from hasten import CallError, Recipe
from hasten.kernels.streams import Streams
from hasten.quantization.linear import Fp8Linear, Int8Linear
from hasten.quantization.projection import Projection, project, same_kind
from tests.passes.test_fuse import close

KERNELS = Recipe.from_dict({"fuse": {"kernels": "on"}})
NONE = torch.empty(0)


def linears(*widths: int, bias: bool = True) -> list[nn.Linear]:
    return [nn.Linear(16, width, bias=bias) for width in widths]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(16,), (16, 32, 16)], ids=str)
@torch.no_grad()
def test_one_product_is_all_of_them(widths: tuple[int, ...], bias: bool) -> None:
    parts = linears(*widths, bias=bias)
    x = torch.randn(7, 16)
    expected = torch.cat([part(x) for part in parts], dim=1)
    projection = Projection(parts)
    torch.testing.assert_close(projection(x, NONE), expected)
    out = torch.empty(7, sum(widths))
    assert projection(x, NONE, out=out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.cat([part(x) for part in parts], dim=1), expected)
    assert projection.changed() is None


@torch.no_grad()
def test_a_bias_may_be_missing_in_some() -> None:
    parts = [nn.Linear(16, 8, bias=False), nn.Linear(16, 8)]
    x = torch.randn(3, 16)
    expected = torch.cat([part(x) for part in parts], dim=1)
    torch.testing.assert_close(Projection(parts)(x, NONE), expected)


def test_merging_twice_takes_the_memory_once() -> None:
    parts = linears(16, 16, 32)
    first = Projection(parts)
    second = Projection(parts)
    assert second.weight.data_ptr() == first.weight.data_ptr()
    assert torch.equal(second.weight, first.weight)
    assert first.changed() is None


def test_neighbours_by_chance_are_merged_as_any() -> None:
    """In the storage of one tensor, but not one after the other."""
    parts, whole = linears(16, 16), torch.randn(48, 16)
    parts[0].weight.data, parts[1].weight.data = whole[:16], whole[32:]
    assert torch.equal(Projection(parts).weight, torch.cat([whole[:16], whole[32:]]))


@torch.no_grad()
def test_what_was_replaced_or_rewritten_is_named() -> None:
    parts = linears(16, 16)
    projection = Projection(parts)
    parts[1].weight.mul_(2.0)  # seen by the merged weight
    assert projection.changed() is None
    parts[1].bias.add_(1.0)  # which is copied
    assert projection.changed() == "weight or bias of a 16×16 Linear"
    parts = linears(16, 16)
    projection = Projection(parts)
    parts[0].weight.data = parts[0].weight.data.clone()
    assert projection.changed() is not None


@pytest.mark.parametrize("streams", [Streams(1, 3, 4), Streams(2, 3, 4), Streams(2, 0, 4)], ids=str)
@torch.no_grad()
def test_text_and_image_rows_have_weights_of_their_own(streams: Streams) -> None:
    text, image = linears(8, 8)
    x = torch.randn(streams.rows, 16)
    got = project((Projection([text]), Projection([image])), (x, NONE), streams)
    cut = streams.text_rows
    torch.testing.assert_close(got, torch.cat([text(x[:cut]), image(x[cut:])]))


def test_kinds_that_do_not_go_together() -> None:
    plain = linears(16, 16)
    fp8 = [Fp8Linear.from_linear(linear) for linear in plain]
    tensor = [Fp8Linear.from_linear(linear, "tensor") for linear in plain]
    assert same_kind(plain, torch.float32) == []
    assert same_kind(fp8, torch.bfloat16) == []
    assert "pass --dtype bfloat16" in same_kind(fp8, torch.float32)[0]
    assert "Fp8Linear and Linear" in same_kind([plain[0], fp8[1]], torch.bfloat16)[0]
    assert 'granularity = "row"' in same_kind(tensor, torch.bfloat16)[0]
    int8 = [Int8Linear.from_linear(linear) for linear in plain]
    assert same_kind(int8, torch.float32) == same_kind(int8, torch.bfloat16) == []
    assert "Int8Linear and Linear" in same_kind([plain[0], int8[1]], torch.bfloat16)[0]
    assert "different kinds" in same_kind(plain, torch.float32, {plain[0]: Int8Linear})[0]
    assert "Conv1d" in same_kind([nn.Conv1d(1, 1, 1)], torch.bfloat16)[0]
    assert same_kind(plain, torch.bfloat16, dict.fromkeys(plain, Fp8Linear)) == []
    assert "different kinds" in same_kind(plain, torch.bfloat16, {plain[0]: Fp8Linear})[0]


def test_two_pipelines_over_the_same_weights(
    make_pipe: Callable[[], Any], call: Callable[..., torch.Tensor]
) -> None:
    pipe = make_pipe()
    expected = call(pipe)
    first, second = (hasten.optimize(pipe, KERNELS, copy=True) for _ in range(2))
    assert close(call(first), expected)
    assert close(call(second), expected)
    assert close(call(first), expected), "merged away from under the first"
    assert torch.equal(call(pipe), expected)


@torch.no_grad()
def test_inputs_that_do_not_belong_together_are_refused(pipe: Any) -> None:
    """The kernels would read past the end of memory where the original blocks raise."""
    transformer = hasten.optimize(pipe, KERNELS).transformer
    given = {
        "hidden_states": torch.randn(2, 4, 64),
        "encoder_hidden_states": torch.randn(1, 3, 24),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.1, 0.1]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    with pytest.raises(CallError, match="latents are a batch of 2, text of 1"):
        transformer(**given)
    with pytest.raises(CallError, match="7 text and image tokens, but 8 positions"):
        transformer(
            **{**given, "encoder_hidden_states": torch.randn(2, 3, 24)}
            | {"img_ids": torch.zeros(5, 3)}
        )
