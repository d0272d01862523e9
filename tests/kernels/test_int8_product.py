from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels.int8_product import (
    TILES,
    int8_product,
    int8_product_reference,
    int8_product_triton,
    tile_for,
)
from tests.kernels.cases import DEVICE, NO_SHRINKING, SEEDS

SMALL = (32, 32, 32, 4, 2)  # a tile that the interpreter makes in no time


def inputs(
    rows: int, columns: int, depth: int, a_row: bool, has_bias: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> Tensor:
        drawn = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return drawn.to(DEVICE)

    def scale(length: int) -> Tensor:
        return (torch.rand((length, 1) if a_row else (), generator=generator) + 0.1).to(DEVICE)

    bias = torch.randn(columns, generator=generator).to(DEVICE) if has_bias else None
    return codes(rows, depth), scale(rows), codes(columns, depth), scale(columns), bias


def in_words(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The module's formula in float64."""
    y = codes.double() @ weight.double().t() * scale.double() * weight_scale.double().t()
    return y if bias is None else y + bias.double()


@settings(max_examples=20, deadline=None, phases=NO_SHRINKING)
@given(
    st.integers(1, 70), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(), SEEDS
)
def test_the_kernel_agrees_with_float64(
    rows: int, columns: int, depth: int, a_row: bool, has_bias: bool, seed: int
) -> None:
    pytest.importorskip("triton")
    given_inputs = inputs(rows, 8 * columns, 16 * depth, a_row, has_bias, seed)
    out = torch.full((rows, 8 * columns), float("nan"), device=DEVICE)
    int8_product_triton(*given_inputs, out, SMALL)
    torch.testing.assert_close(out.double(), in_words(*given_inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_writes_any_dtype_and_parts_of_a_tensor(dtype: torch.dtype) -> None:
    codes, scale, *rest = inputs(40, 16, 32, True, True, 0)
    rest = [scale / 100, *rest]  # within the range of float16
    out = torch.zeros(64, 16, device=DEVICE, dtype=dtype)
    int8_product(codes, *rest, out[24:])
    expected = in_words(codes, *rest)
    assert not out[:24].any()
    assert (out[24:] - expected).norm() <= torch.finfo(dtype).eps * expected.norm()


def test_the_reference_is_the_formula() -> None:
    given_inputs = inputs(20, 24, 48, True, True, 1)
    exact = in_words(*given_inputs)
    torch.testing.assert_close(int8_product_reference(*given_inputs, torch.float64), exact)


def test_what_is_not_finite_stays_so() -> None:
    codes, scale, *rest = inputs(20, 16, 32, True, True, 2)
    scale[3] = float("inf")
    scale[4] = float("nan")
    out = torch.zeros(20, 16, device=DEVICE)
    int8_product(codes, scale, *rest, out)
    assert not out[3:5].isfinite().any()
    assert out[:3].isfinite().all()
    assert out[5:].isfinite().all()


def test_the_operator_passes_pytorchs_own_checks() -> None:
    for a_row in (False, True):
        arguments = (*inputs(20, 16, 32, a_row, a_row, 3), torch.empty(20, 16, device=DEVICE))
        torch.library.opcheck(int8_product, arguments)


@pytest.mark.parametrize(
    ("gpu", "kilobytes", "processors"), [("H100", 227, 132), ("RTX 3090", 99, 82), ("T4", 64, 40)]
)
def test_a_tile_fits_the_shared_memory(gpu: str, kilobytes: int, processors: int) -> None:
    rows, columns, depth, _, stages = found = tile_for(4608, 3072, kilobytes * 1024, processors)
    assert (rows + columns) * depth * stages <= kilobytes * 1024, gpu
    assert (found == TILES[0]) == (kilobytes >= 96)
    assert tile_for(4608, 3072, 0, processors) == TILES[-1]


def test_few_rows_are_cut_smaller_so_that_every_processor_has_a_tile() -> None:
    assert tile_for(512, 3072, 2**18, 96) == TILES[0]
    assert tile_for(512, 3072, 2**18, 97) == TILES[1]
    assert tile_for(1, 16, 2**18, 97) == TILES[-1]
