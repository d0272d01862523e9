"""FP8 linears with calibrated scales: the law they follow, and how they take a linear's place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hasten.engines.tensorrt import nodes
from hasten.engines.tensorrt.nodes import BITS, Amax, QdqLinear, factors, swap
from hasten.errors import EngineError
from hasten.kernels.quantize import FP8
from hasten.quantization.linear import EmulatedLinear

GRID = torch.arange(256, dtype=torch.uint8).view(FP8).double()
GRID = GRID[GRID.isfinite()].unique()
sizes = st.floats(1e-4, 1e4)


def linear(inputs: int = 8, outputs: int = 5, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def identity(amax: float, dtype: torch.dtype = torch.float32) -> QdqLinear:
    """Rounds its input and does nothing else: its weight is 1 exactly."""
    return stand_in_for(torch.eye(4, dtype=dtype), Amax(amax, 448.0))


def stand_in_for(weight: Tensor, amax: Amax) -> QdqLinear:
    plain = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return QdqLinear.calibrated(plain, amax)


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), sizes)
def test_inputs_go_to_the_nearest_code_and_saturate(values: list[float], amax: float) -> None:
    x = torch.tensor([values]) * amax
    rounded = identity(amax)(x).double()
    scale = (torch.tensor(amax, dtype=torch.float32) / 448).double()
    wanted = (x.double() / scale).clamp(-448, 448)
    nearest = (GRID - wanted[..., None]).abs().amin(dim=-1)
    off = (rounded / scale - wanted).abs()
    assert (off <= nearest * (1 + 1e-5) + 1e-4).all()


def test_what_is_beyond_the_largest_becomes_it() -> None:
    x = torch.tensor([[math.inf, -math.inf, 100.0, -7.01]])
    assert identity(7.0)(x).tolist() == [[7.0, -7.0, 7.0, -7.0]]
    assert identity(7.0)(torch.full((1, 4), math.nan)).isnan().all()


def test_zeros_stay_zeros_where_nothing_was_ever_seen() -> None:
    silent = stand_in_for(torch.zeros(4, 4), Amax(0.0, 0.0))
    assert torch.equal(silent(torch.zeros(2, 4)), torch.zeros(2, 4))
    half = stand_in_for(torch.zeros(4, 4).half(), Amax(0.0, 0.0))
    assert torch.equal(half(torch.zeros(2, 4).half()), torch.zeros(2, 4).half())


@settings(deadline=None)
@given(st.integers(0, 999), sizes)
def test_it_is_the_fake_quantisation_of_both_sides(seed: int, amax: float) -> None:
    plain = linear(seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(2, 3, 8) * amax / 2
    stand_in = QdqLinear.calibrated(plain, Amax(amax, float(plain.weight.abs().max())))
    emulated = EmulatedLinear.from_linear(plain, "tensor", amax=amax)
    torch.testing.assert_close(stand_in(x), emulated(x), rtol=1e-5, atol=1e-5 * amax)


def test_there_is_one_scale_a_tensor() -> None:
    stand_in = QdqLinear.calibrated(linear(), Amax(3.0, 0.5))
    shapes = {name: tuple(x.shape) for name, x in stand_in.named_buffers()}
    scales = dict.fromkeys(("weight_scale", "weight_zero", "input_scale", "input_zero"), ())
    assert shapes == {"weight": (5, 8), **scales}
    assert float(stand_in.weight_zero.float()) == float(stand_in.input_zero.float()) == 0
    assert float(stand_in.input_scale) == pytest.approx(3 / 448)
    assert float(stand_in.weight_scale) == pytest.approx(0.5 / 448)


def test_smoothing_moves_factors_from_inputs_to_weights() -> None:
    plain, x = linear(), torch.randn(6, 8) * torch.tensor([40.0, *[1.0] * 7])
    smooth = torch.tensor([1 / 40, *[1.0] * 7])
    weight = float((plain.weight / smooth).abs().max())
    inputs = float((x * smooth).abs().max())
    stand_in = QdqLinear.calibrated(plain, Amax(inputs, weight, smooth))
    dequantised = stand_in.weight.float() * stand_in.weight_scale * smooth
    assert (dequantised - plain.weight).abs().max() < weight / 16
    assert (stand_in(x) - plain(x)).norm() < 0.1 * plain(x).norm()
    assert not torch.equal(
        stand_in(x), QdqLinear.calibrated(plain, Amax(inputs, weight))(x * smooth)
    )


def test_codes_do_not_depend_on_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, amax = linear(outputs=11), Amax(2.0, 0.3, torch.rand(8) + 0.5)
    whole = QdqLinear.calibrated(plain, amax)
    monkeypatch.setattr(nodes, "ROWS_AT_ONCE", 3)
    parts = QdqLinear.calibrated(plain, amax)
    assert torch.equal(whole.weight.view(torch.uint8), parts.weight.view(torch.uint8))


def test_scales_are_rounded_before_codes_are_made() -> None:
    plain = linear().to(torch.bfloat16)
    stand_in = QdqLinear.calibrated(plain, Amax(3.1, 0.33))
    assert stand_in.input_scale.dtype == stand_in.weight_scale.dtype == torch.bfloat16
    scale = stand_in.weight_scale.float()
    expected = (plain.weight.float() / scale).clamp(-448, 448).to(FP8)
    assert torch.equal(stand_in.weight.view(torch.uint8), expected.view(torch.uint8))
    codes, values = stand_in.weight.view(torch.uint8).clone(), float(scale)
    wide = stand_in.float()
    assert torch.equal(wide.weight.view(torch.uint8), codes)
    assert wide.weight.dtype == wide.input_zero.dtype == FP8
    assert wide.weight_scale.dtype == torch.float32
    assert float(wide.weight_scale) == values


def test_it_answers_in_the_dtype_of_its_input() -> None:
    stand_in = QdqLinear.calibrated(linear(), Amax(3.0, 0.5)).to(torch.bfloat16)
    assert stand_in(torch.randn(2, 8).to(torch.bfloat16)).dtype == torch.bfloat16


def test_swapping_leaves_all_else_alone() -> None:
    model = nn.Sequential(linear(), nn.Sequential(linear(5, 5), nn.GELU()), linear(5, 8))
    kept, bias = model[0], model[1][0].bias
    swap(model, {"1.0": Amax(3.0, 0.5), "2": Amax(3.0, 0.5)})
    assert [type(model[0]), type(model[1][0]), type(model[2])] == [nn.Linear, QdqLinear, QdqLinear]
    assert model[0] is kept
    assert model[1][0].bias is bias
    assert model(torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.parametrize("name", ["1", "7", "", "0.weight"])
def test_a_name_that_is_no_linear_is_refused_and_nothing_swapped(name: str) -> None:
    model = nn.Sequential(linear(), nn.GELU())
    with pytest.raises(EngineError, match="1 calibrated layers are not plain linears"):
        swap(model, {"0": Amax(3.0, 0.5), name: Amax(3.0, 0.5)})
    assert type(model[0]) is nn.Linear


DTYPES = {"BFLOAT16": torch.bfloat16, "FLOAT16": torch.float16}


@settings(deadline=None)
@given(st.integers(1, 512), st.sampled_from(sorted(BITS)))
def test_both_are_of_the_dtype_and_beat_two_equal_ones(head_dim: int, name: str) -> None:
    """The bounds on the error are the worst of these head sizes, rounded up."""
    scale, dtype = head_dim**-0.5, DTYPES[name]
    pair = factors(scale, BITS[name])
    for factor in pair:
        assert float(torch.tensor(factor, dtype=dtype)) == factor
        assert math.sqrt(scale) / 2 <= factor <= math.sqrt(scale) * 2
    equal = float(torch.tensor(math.sqrt(scale), dtype=dtype))
    error = abs(pair[0] * pair[1] / scale - 1)
    assert error <= abs(equal * equal / scale - 1)
    assert error < {"BFLOAT16": 2.5e-4, "FLOAT16": 4e-6}[name]


@pytest.mark.parametrize("head_dim", [16, 64])
def test_powers_of_two_are_exact(head_dim: int) -> None:
    first, second = factors(head_dim**-0.5, 8)
    assert first * second == head_dim**-0.5
