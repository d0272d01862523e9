"""The error of each layer on real activations: floors for every scheme, and the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hasten.families.flux1 import FLUX1
from hasten.quantization.linear import quantized
from hasten.quantization.report import LayerError, layer_errors, worth_skipping
from hasten.recipe import Quantize

Draw = Callable[..., torch.Tensor]

# dB, of the worst layer and of the median one, on the bundled model: two under what was measured.
FLOORS = {
    ("fp8", "row"): (26, 29.5),
    ("fp8", "tensor"): (25.5, 29.5),
    ("int8", "row"): (32.5, 39),
    ("int8", "tensor"): (28.5, 34),
    ("fp8-weight", "row"): (28.5, 32.5),
    ("fp8-weight", "tensor"): (28.5, 32.5),
    ("int8-weight", "row"): (40, 44),
    ("int8-weight", "tensor"): (34.5, 39.5),
}


@pytest.mark.parametrize(("scheme", "granularity"), FLOORS)
def test_every_layer_of_the_bundled_model_is_above_its_floor(
    tiny: Any, draw: Draw, scheme: Any, granularity: Any
) -> None:
    linears = FLUX1.quantizable(tiny.transformer)
    recipe = Quantize(scheme=scheme, granularity=granularity)
    errors = layer_errors(linears, recipe, lambda: draw(tiny, 2, "latent"))
    worst, middle = FLOORS[scheme, granularity]
    assert len(errors) == len(linears) == 83
    assert {error.calls for error in errors} == {2}
    assert errors == sorted(errors, key=lambda error: error.sqnr_db)
    assert errors[0].sqnr_db > worst, errors[0]
    assert errors[41].sqnr_db > middle
    assert not any(linear._forward_hooks for _, linear in linears)


@pytest.fixture
def linears() -> list[tuple[str, nn.Linear]]:
    torch.manual_seed(0)
    made = [(f"layer{index}", nn.Linear(64, 64)) for index in range(8)]
    return [(name, linear.requires_grad_(False)) for name, linear in made]


def test_the_ratio_is_of_energies_over_all_calls(linears: list[tuple[str, nn.Linear]]) -> None:
    (name, linear), *_ = linears
    inputs = [torch.randn(5, 64) * size for size in (1, 10, 100)]

    def run() -> None:
        for x in inputs:
            linear(x)

    (found,) = layer_errors(linears, Quantize(), run, calls=2)
    y = torch.cat([linear(x) for x in inputs[:2]])
    error = torch.cat([quantized(linear, Quantize())(x) for x in inputs[:2]]) - y
    assert found.name == name
    assert (found.inputs, found.outputs, found.calls) == (64, 64, 2)
    expected = 10 * math.log10(y.square().sum() / error.square().sum())
    assert found.sqnr_db == pytest.approx(expected, abs=1e-3)


def test_a_run_that_fails_leaves_no_hooks(linears: list[tuple[str, nn.Linear]]) -> None:
    def run() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        layer_errors(linears, Quantize(), run)
    assert not any(linear._forward_hooks for _, linear in linears)


def test_no_error_is_infinite_and_no_number_is_the_worst(
    linears: list[tuple[str, nn.Linear]],
) -> None:
    (_, good), (_, exact), (_, broken), *_ = linears
    exact.weight.data.zero_()
    broken.weight.data[0, 0] = float("nan")

    def run() -> None:
        for linear in (good, exact, broken):
            linear(torch.randn(3, 64))

    errors = layer_errors(linears, Quantize(), run)
    assert [error.name for error in errors] == ["layer2", "layer0", "layer1"]
    assert errors[0].sqnr_db == -math.inf
    assert errors[2].sqnr_db == math.inf
    assert worth_skipping(errors) == ["layer2"]


def test_an_outlier_is_worth_skipping(linears: list[tuple[str, nn.Linear]]) -> None:
    """One huge weight leaves a whole layer's others with few codes, where all share one scale."""
    linears[3][1].weight.data[5, 5] = 50.0

    def run() -> None:
        x = torch.randn(16, 64)
        x[:, 5] = 0  # the huge weight is not used: its error is not drowned in a huge output
        for _, linear in linears:
            linear(x)

    recipe = Quantize(scheme="int8", granularity="tensor")
    assert worth_skipping(layer_errors(linears, recipe, run)) == ["layer3"]
    assert worth_skipping([]) == []
    even = [LayerError(str(index), 1, 1, 30.0 + index, 1) for index in range(5)]
    assert worth_skipping(even) == []
