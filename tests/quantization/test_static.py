"""Static scales: equal to dynamic ones of the same maximum, saturating beyond it, fully named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.errors import RecipeError, UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.quantization.linear import EmulatedLinear, Fp8Linear, QuantizedLinear, quantized
from hasten.quantization.plan import plan_linears, plan_problems
from hasten.quantization.projection import same_kind
from hasten.quantization.report import layer_errors
from hasten.recipe import Quantize, Recipe

GRANULARITIES = ("row", "tensor")
each = pytest.mark.parametrize("granularity", GRANULARITIES)
both = pytest.mark.parametrize("emulate", [False, True], ids=["real", "emulated"])


def static(amax: float, granularity: Any = "row", *, emulate: bool = False) -> Quantize:
    return Quantize(
        granularity=granularity, emulate=emulate, activations="static", amax={"one": amax}
    )


def made(linear: nn.Linear, recipe: Quantize) -> QuantizedLinear:
    return quantized(linear, recipe, "one")


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 48).requires_grad_(False)


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** torch.empty(()).uniform_(-4, 4, generator=generator)
    return (torch.randn(2, 19, 64, generator=generator) * size).to(dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_within_the_range_it_is_dynamic_quantisation_of_the_same_maximum(
    linear: nn.Linear, seed: int, dtype: torch.dtype, emulate: bool
) -> None:
    if dtype == torch.float64 and not emulate:
        pytest.skip("torch._scaled_mm gives no float64")
    linear, x = linear.to(dtype), inputs(seed, dtype)
    dynamic = quantized(linear, Quantize(granularity="tensor", emulate=emulate))
    given = made(linear, static(x.abs().max().item(), "tensor", emulate=emulate))
    assert torch.equal(given(x), dynamic(x))
    few = x[:, 3:7] * 0.5  # on its own, a dynamic scale would be another
    alone = made(linear, static(x.abs().max().item(), "tensor", emulate=emulate))(few)
    assert torch.equal(alone, dynamic(torch.cat([few, x], dim=1))[:, :4])


@both
def test_rows_of_weights_keep_their_scales(linear: nn.Linear, emulate: bool) -> None:
    """Rounded activations times row-wise weights, nearer than one scale for the whole weight."""
    linear.weight[7] *= 1000
    x = inputs(1)
    amax = x.abs().max().item()
    by_row, by_tensor = (made(linear, static(amax, g, emulate=emulate)) for g in GRANULARITIES)
    assert by_row.weight_scale.shape == (48, 1)
    assert by_tensor.weight_scale.shape == ()
    others = [row for row in range(48) if row != 7]
    exact = linear(x)[..., others]
    near, far = ((y(x)[..., others] - exact).norm() for y in (by_row, by_tensor))
    assert near < far


@each
def test_emulation_rounds_as_the_real_product_does(linear: nn.Linear, granularity: Any) -> None:
    x = inputs(2)
    amax = x.abs().max().item() / 3  # some saturate
    real, emulated = (made(linear, static(amax, granularity, emulate=e)) for e in (False, True))
    assert isinstance(real, Fp8Linear)
    assert isinstance(emulated, EmulatedLinear)
    torch.testing.assert_close(real(x), emulated(x), rtol=1e-4, atol=1e-5 * x.abs().max().item())


@both
@each
@pytest.mark.parametrize("beyond", [1.01, 1e4, 1e30, float("inf")])
def test_values_beyond_saturate_and_are_never_nan(
    linear: nn.Linear, granularity: Any, emulate: bool, beyond: float
) -> None:
    x = inputs(3)
    amax = x.abs().max().item()
    stand_in = made(linear, static(amax, granularity, emulate=emulate))
    clamped = x.clone()
    clamped[0, 0, :4] = torch.tensor([1, -1, 1, -1]) * amax
    x[0, 0, :4] = torch.tensor([1, -1, 1, -1]) * amax * beyond
    assert torch.equal(stand_in(x), stand_in(clamped))
    assert stand_in(x).isfinite().all()


@both
@each
def test_what_is_not_a_number_stays_so(linear: nn.Linear, granularity: Any, emulate: bool) -> None:
    x = inputs(4)
    x[1, 3, 7] = float("nan")
    y = made(linear, static(5.0, granularity, emulate=emulate))(x)
    assert y[1, 3].isnan().all()
    assert y[0].isfinite().all()


@pytest.mark.parametrize("amax", [1e-300, 1e-20, 3e38])
def test_extreme_scales_give_numbers(linear: nn.Linear, amax: float) -> None:
    for x in (torch.zeros(3, 64), inputs(0)):
        assert made(linear, static(amax))(x).isfinite().all()


@both
@each
def test_the_scale_moves_and_is_kept(linear: nn.Linear, granularity: Any, emulate: bool) -> None:
    x = inputs(5)
    stand_in = made(linear, static(2.5, granularity, emulate=emulate))
    expected = stand_in(x)
    other = made(nn.Linear(64, 48).requires_grad_(False), static(9, granularity, emulate=emulate))
    other.load_state_dict(stand_in.state_dict())
    assert torch.equal(other(x), expected)
    twin = copy.deepcopy(stand_in).to(torch.bfloat16)
    assert twin.input_scale is not None
    assert twin.input_scale.dtype == torch.float32
    assert twin.input_scale.item() == pytest.approx(2.5 / 448)
    assert twin.to("meta").input_scale.is_meta
    assert "calibrated input scale" in repr(stand_in)
    assert "calibrated" not in repr(quantized(linear, Quantize()))


def test_kernels_that_find_their_own_scales_do_not_take_them(linear: nn.Linear) -> None:
    found = same_kind([made(linear, static(1.0))], torch.bfloat16)
    assert found == [
        'the kernels compute the scales of each call: set quantize.activations = "dynamic"'
    ]


@pytest.mark.parametrize(
    ("quantize", "fault"),
    [
        ({"activations": "static"}, "`hasten calibrate-scales`"),
        ({"activations": "static", "amax": {}}, "`hasten calibrate-scales`"),
        ({"amax": {"a": 1.0}}, 'belong to activations = "static"'),
        ({"fingerprint": "0"}, 'belong to activations = "static"'),
        ({"scheme": "int8", "activations": "static", "amax": {"a": 1.0}}, 'for scheme = "fp8"'),
        ({"activations": "static", "amax": {"a": 0.0}}, "quantize.amax.a = 0.0"),
        ({"activations": "static", "amax": {"a": float("nan")}}, "quantize.amax.a = NaN"),
        ({"activations": "static", "amax": {"a": 4e38}}, "quantize.amax.a = 4e+38"),
        ({"activations": "static", "amax": {"a": "big"}}, "quantize.amax.a ="),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(quantize: dict[str, Any], fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"quantize": quantize})
    assert len(caught.value.faults) == 1
    assert fault in caught.value.faults[0]


def test_missing_and_unknown_linears_are_one_error_before_anything_changes(pipe: Any) -> None:
    linears = FLUX1.quantizable(pipe.transformer)
    amax = {name: 4.0 for name, _ in linears}
    first, second = (name for name, _ in linears[:2])
    whole = Quantize(activations="static", amax=amax, emulate=True)
    assert plan_problems(pipe.transformer, linears, whole) == []
    del amax[first], amax[second]
    wrong = Quantize(activations="static", amax={**amax, "proj_out": 1.0}, emulate=True)
    (problem,) = plan_problems(pipe.transformer, linears, wrong)
    assert f"no value for {first} (2 in total)" in problem.fault
    assert "no quantisable linear is called proj_out (1 in total)" in problem.fault
    assert "hasten calibrate-scales" in problem.fix
    before = dict(pipe.transformer.named_modules())
    with pytest.raises(UnsupportedError, match="no value for"):
        hasten.optimize(pipe, Recipe(quantize=wrong))
    assert dict(pipe.transformer.named_modules()) == before
    skipping = whole.model_copy(update={"amax": amax, "skip": (first, second)})
    assert len(plan_linears(pipe.transformer, linears, skipping).names) == len(linears) - 2
    skipping = whole.model_copy(update={"skip": (first,)})
    assert plan_problems(pipe.transformer, linears, skipping) == [], "left over, and no fault"


def test_the_report_measures_each_linear_by_its_own_scale() -> None:
    torch.manual_seed(0)
    linears = [(name, nn.Linear(32, 32).requires_grad_(False)) for name in ("good", "low")]
    x = torch.randn(9, 32)
    largest = x.abs().max().item()
    recipe = Quantize(activations="static", amax={"good": largest, "low": largest / 20})
    errors = layer_errors(linears, recipe, lambda: [linear(x) for _, linear in linears])
    assert [error.name for error in errors] == ["low", "good"]
    assert errors[0].sqnr_db < 3
    assert errors[1].sqnr_db > 25
