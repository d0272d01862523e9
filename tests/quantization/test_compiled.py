"""Under torch.compile: one graph, the same numbers, and no setting of torch's changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from hasten.machine import machine
from hasten.quantization.linear import QuantizedLinear, quantized
from hasten.recipe import Quantize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        machine().compile_problem("cpu") is not None, reason="torch.compile cannot work here"
    ),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def settings_of_torch() -> dict[str, Any]:
    """Every flag of inductor and Dynamo, and the global ones of torch."""
    import torch._inductor.config

    return {
        "inductor": torch._inductor.config.get_config_copy(),
        "dynamo": torch._dynamo.config.get_config_copy(),
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
    }


class Block(nn.Module):
    """Two quantised linears with what inductor may fuse around them."""

    def __init__(self, recipe: Quantize) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.up = quantized(nn.Linear(64, 256).requires_grad_(False), recipe, "up")
        self.down = quantized(nn.Linear(256, 64).requires_grad_(False), recipe, "down")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


@pytest.mark.parametrize(
    "recipe",
    [
        Quantize(),
        Quantize(emulate=True),
        Quantize(activations="static", amax={"up": 2.5, "down": 1.5}),
        Quantize(scheme="int8"),
        Quantize(scheme="fp8-weight"),
    ],
    ids=lambda recipe: f"{recipe.scheme}-{recipe.activations}{'-emulated' * recipe.emulate}",
)
@torch.no_grad()
def test_a_block_is_one_graph_with_the_same_numbers(recipe: Quantize) -> None:
    before = copy.deepcopy(settings_of_torch())
    block = Block(recipe)
    x = torch.randn(1, 24, 64)
    expected = block(x)
    block.compile(fullgraph=True)
    got = block(x)
    # A code on the edge may fall to the other side: a unit in the last place of one activation.
    assert (got - expected).norm() < 0.01 * (expected - x).norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert settings_of_torch() == before


@torch.no_grad()
def test_other_lengths_recompile_once_at_most() -> None:
    block = Block(Quantize())
    expected = [block(torch.full((1, tokens, 64), 0.5)) for tokens in (24, 48, 7, 90)]
    block.compile(fullgraph=True)
    got = [block(torch.full((1, tokens, 64), 0.5)) for tokens in (24, 48, 7, 90)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    assert counters["stats"]["unique_graphs"] <= 2
    assert isinstance(block.up, QuantizedLinear)
