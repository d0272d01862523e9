"""What stands in for a linear: how near it is, which kernel ran, and how it moves."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.kernels.quantize import quantize_rows
from hasten.quantization.linear import (
    EmulatedLinear,
    Fp8Linear,
    Int8Linear,
    fp8_product,
    quantized,
)
from hasten.recipe import Quantize

SCHEMES = ("fp8", "int8", "fp8-weight", "int8-weight")
# dB on Gaussian weights and activations; three below what was measured with one scale a tensor.
FLOORS = {"fp8": 25, "int8": 36, "fp8-weight": 28, "int8-weight": 43}
REAL = [Quantize(scheme=s, granularity=g) for s in SCHEMES for g in ("row", "tensor")]
EMULATED = [recipe.model_copy(update={"emulate": True}) for recipe in REAL]


def name_of(recipe: Any) -> str:
    if not isinstance(recipe, Quantize):
        return str(recipe).removeprefix("torch.")
    return f"{recipe.scheme}-{recipe.granularity}{'-emulated' * recipe.emulate}"


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(192, 320).requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 37, 192, generator=torch.Generator().manual_seed(1))


def sqnr(exact: Tensor, got: Tensor) -> float:
    exact, got = exact.double(), got.double()
    return float(10 * torch.log10(exact.square().sum() / (exact - got).square().sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("recipe", [*REAL, *EMULATED], ids=name_of)
def test_the_output_is_near_and_in_the_activations_dtype(
    linear: nn.Linear, x: Tensor, recipe: Quantize, dtype: torch.dtype
) -> None:
    stand_in = quantized(linear.to(dtype), recipe)
    y = stand_in(x.to(dtype))
    assert y.dtype == dtype
    assert y.shape == (2, 37, 320)
    assert sqnr(linear(x.to(dtype)), y) > FLOORS[recipe.scheme]


@pytest.mark.parametrize("recipe", REAL, ids=name_of)
def test_emulation_rounds_as_the_real_product_does(
    linear: nn.Linear, x: Tensor, recipe: Quantize
) -> None:
    """In float32 the two differ by the order of additions only."""
    emulated = quantized(linear, recipe.model_copy(update={"emulate": True}))
    assert isinstance(emulated, EmulatedLinear)
    assert sqnr(quantized(linear, recipe)(x), emulated(x)) > 110


@pytest.mark.parametrize("recipe", REAL, ids=name_of)
def test_in_bfloat16_emulation_is_the_same_within_its_rounding(
    linear: nn.Linear, x: Tensor, recipe: Quantize
) -> None:
    linear, x = linear.to(torch.bfloat16), x.to(torch.bfloat16)
    emulated = quantized(linear, recipe.model_copy(update={"emulate": True}))
    assert sqnr(quantized(linear, recipe)(x), emulated(x)) > 45


class Products(TorchDispatchMode):
    """Counts the products that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "mm" in name or "product" in name:
            self.ran[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", [*REAL, *EMULATED], ids=name_of)
def test_the_schemes_own_product_runs_and_no_other(
    linear: nn.Linear, x: Tensor, recipe: Quantize
) -> None:
    stand_in = quantized(linear, recipe)
    with torch.no_grad(), Products() as products:
        stand_in(x)
    expected = {"fp8": "_scaled_mm", "int8": "int8_product"}.get(recipe.scheme, "addmm")
    assert products.ran == {"addmm" if recipe.emulate else expected: 1}


@pytest.mark.parametrize("recipe", REAL, ids=name_of)
def test_weights_take_a_byte_each(linear: nn.Linear, recipe: Quantize) -> None:
    stand_in = quantized(linear, recipe)
    assert stand_in.weight.shape == (stand_in.out_features, stand_in.in_features) == (320, 192)
    assert stand_in.weight.itemsize == 1
    assert stand_in.weight_scale.dtype == torch.float32
    assert stand_in.weight_scale.shape == ((320, 1) if recipe.granularity == "row" else ())
    assert stand_in.granularity == recipe.granularity
    assert [name for name, _ in stand_in.named_parameters()] == ["bias"]
    assert stand_in.bias is linear.bias


def test_a_product_writes_where_it_is_told(linear: nn.Linear, x: Tensor) -> None:
    stand_in = Fp8Linear.from_linear(linear)
    factors = (*quantize_rows(x), stand_in.weight, stand_in.weight_scale, stand_in.bias)
    expected = fp8_product(*factors)
    assert expected.dtype == torch.bfloat16
    tall = torch.zeros(200, 320, dtype=torch.bfloat16)
    fp8_product(*factors, out=tall[100:174])
    assert torch.equal(tall[100:174], expected)
    assert (tall[:100] == 0).all()
    assert (tall[174:] == 0).all()


def test_int8_sums_are_exact() -> None:
    """Integers up to 127 are their own codes, so the product is the integer product."""
    integers = lambda *shape: torch.randint(-127, 128, shape).float()  # noqa: E731
    weight, x = integers(24, 4096), integers(5, 4096)
    weight[:, 0] = x[:, 0] = 127
    linear = nn.Linear(4096, 24, bias=False)
    linear.weight.data = weight
    exact = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(Int8Linear.from_linear(linear)(x), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recipe", [*REAL, *EMULATED], ids=name_of)
def test_without_a_bias_and_with_any_leading_shape(recipe: Quantize) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    stand_in = quantized(linear, recipe)
    assert stand_in.bias is None
    for shape in ((64,), (1, 64), (2, 3, 5, 64)):
        y = stand_in(torch.randn(shape))
        assert y.shape == (*shape[:-1], 32)


@pytest.mark.parametrize("recipe", [*REAL, *EMULATED], ids=name_of)
def test_what_is_not_finite_comes_out(linear: nn.Linear, x: Tensor, recipe: Quantize) -> None:
    x[1, 3, 7] = float("nan")
    y = quantized(linear, recipe)(x)
    assert not y[1, 3].isfinite().any()
    if recipe.granularity == "row" or recipe.scheme.endswith("-weight"):
        assert y[0].isfinite().all()


@pytest.mark.parametrize("recipe", [*REAL, *EMULATED], ids=name_of)
def test_codes_and_scales_keep_their_dtype_when_the_model_changes_its_own(
    linear: nn.Linear, x: Tensor, recipe: Quantize
) -> None:
    stand_in = quantized(linear, recipe)
    expected = stand_in(x)
    codes, scale = stand_in.weight.clone(), stand_in.weight_scale.clone()
    stand_in.to(torch.bfloat16)
    assert stand_in.bias.dtype == torch.bfloat16
    assert stand_in.weight_scale.dtype == torch.float32
    assert torch.equal(stand_in.weight_scale, scale)
    if not recipe.emulate:
        assert torch.equal(stand_in.weight.float(), codes.float())
        assert stand_in.weight.dtype == codes.dtype
    y = stand_in(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert sqnr(expected, y) > 30
    stand_in.to("meta")
    assert stand_in.weight.is_meta
    assert stand_in.weight_scale.is_meta


@pytest.mark.parametrize("recipe", [*REAL, *EMULATED], ids=name_of)
def test_copies_and_state_dicts_carry_everything(
    linear: nn.Linear, x: Tensor, recipe: Quantize
) -> None:
    stand_in = quantized(linear, recipe)
    expected = stand_in(x)
    assert torch.equal(copy.deepcopy(stand_in)(x), expected)
    other = quantized(nn.Linear(192, 320).requires_grad_(False), recipe)
    other.load_state_dict(stand_in.state_dict())
    assert torch.equal(other(x), expected)


def test_its_text_says_what_it_is(linear: nn.Linear) -> None:
    assert "float8_e4m3fn, scale per row" in repr(quantized(linear, Quantize()))
    emulated = quantized(linear, Quantize(scheme="int8-weight", emulate=True))
    assert "weight rounded as torch.int8" in repr(emulated)


@pytest.mark.parametrize(
    ("scheme", "granularity", "spoiled"),
    [
        ("fp8", "row", False),
        ("fp8", "tensor", False),  # small values keep their three bits down to 2^-6
        ("int8", "row", False),
        ("int8", "tensor", True),
    ],
)
def test_what_a_huge_token_does_to_the_others(
    linear: nn.Linear, x: Tensor, scheme: Any, granularity: Any, spoiled: bool
) -> None:
    x[0, 0] *= 1e4
    stand_in = quantized(linear, Quantize(scheme=scheme, granularity=granularity))
    assert (sqnr(linear(x)[1], stand_in(x)[1]) < FLOORS[scheme]) == spoiled
