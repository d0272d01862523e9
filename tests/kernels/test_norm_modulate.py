from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels.norm_modulate import (
    norm_modulate,
    norm_modulate_reference,
    norm_modulate_triton,
)
from hasten.kernels.quantize import FP8
from hasten.kernels.streams import Streams
from tests.kernels.cases import CODES, DEVICE, NO_SHRINKING, SEEDS, STREAMS, assert_codes_stand_for

WIDTHS = st.sampled_from([16, 48, 192])


def inputs(streams: Streams, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    x, delta = (torch.randn(streams.rows, width, generator=generator) for _ in range(2))
    table = torch.randn(streams.batch, 8 * width, generator=generator)
    offsets = (torch.randperm(7, generator=generator)[:6] * width).tolist()
    return x.to(DEVICE), delta.to(DEVICE), table.to(DEVICE), offsets


def in_words(
    x: Tensor, delta: Tensor, table: Tensor, offsets: list[int], streams: Streams
) -> Tensor:
    """The module's formula, row by row."""
    rows = []
    for row, (values, added) in enumerate(zip(x.double(), delta.double(), strict=True)):
        text = row < streams.text_rows
        sequence = row // streams.text if text else (row - streams.text_rows) // streams.image
        shift, scale, gate = (
            table[sequence, start : start + len(values)].double()
            for start in (offsets[:3] if text else offsets[3:])
        )
        total = values + gate * added
        normed = (total - total.mean()) / (total.var(correction=0) + 1e-6).sqrt()
        rows.append(normed * (1 + scale) + shift)
    return torch.stack(rows)


@settings(max_examples=10, deadline=None, phases=NO_SHRINKING)
@given(STREAMS, WIDTHS, SEEDS)
def test_the_reference_is_the_formula(streams: Streams, width: int, seed: int) -> None:
    x, delta, table, offsets = inputs(streams, width, seed)
    exact = in_words(x, delta, table, offsets, streams)
    y, _ = norm_modulate_reference(
        x.double(), delta, table, offsets, streams, None, 1e-6, torch.float64
    )
    torch.testing.assert_close(y, exact)


@settings(max_examples=10, deadline=None, phases=NO_SHRINKING)
@given(STREAMS, WIDTHS, SEEDS, st.booleans(), CODES)
def test_the_kernel_agrees_with_float64(
    streams: Streams, width: int, seed: int, has_delta: bool, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    x, delta, table, offsets = inputs(streams, width, seed)
    added = delta if has_delta else None
    exact_x, kernel_x = x.double(), x.clone()
    exact, _ = norm_modulate_reference(
        exact_x, added, table, offsets, streams, None, 1e-6, torch.float64
    )
    y, none = norm_modulate_triton(kernel_x, added, table, offsets, streams, None, 1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel_x.double(), exact_x, rtol=1e-6, atol=1e-6)
    assert none.numel() == 0
    codes, scales = norm_modulate_triton(x.clone(), added, table, offsets, streams, dtype, 1e-6)
    assert_codes_stand_for(codes, scales, exact)


@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
def test_a_row_of_zeros_has_codes_of_zero(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    streams = Streams(1, 1, 1)
    x, table = torch.zeros(2, 16, device=DEVICE), torch.zeros(1, 16, device=DEVICE)
    codes, scales = norm_modulate_triton(x, None, table, [0] * 6, streams, dtype, 1e-6)
    assert (codes.float() == 0).all()
    assert (scales > 0).all()


def test_the_operator_passes_pytorchs_own_checks() -> None:
    streams = Streams(2, 1, 2)
    x, delta, table, offsets = inputs(streams, 16, 0)
    for added in (None, delta):
        for codes in (None, FP8, torch.int8):
            arguments = (x.clone(), added, table, offsets, list(streams), codes, 1e-6)
            torch.library.opcheck(norm_modulate, arguments)
