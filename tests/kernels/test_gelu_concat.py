from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels.gelu_concat import gelu_concat, gelu_concat_reference, gelu_concat_triton
from hasten.kernels.quantize import FP8
from hasten.kernels.streams import Streams
from tests.kernels.cases import CODES, DEVICE, NO_SHRINKING, SEEDS, STREAMS, assert_codes_stand_for

WIDTHS = st.sampled_from([16, 48])
PARTS = st.sampled_from(["both", "attention", "hidden"])


def inputs(
    streams: Streams, width: int, parts: str, seed: int
) -> tuple[Tensor | None, Tensor | None]:
    """The hidden row comes as columns of a wider projection."""
    generator = torch.Generator().manual_seed(seed)
    tokens = streams.text + streams.image
    attention = torch.randn(streams.batch, tokens, width, generator=generator).to(DEVICE)
    wide = 3 * torch.randn(streams.rows, 7 * width, generator=generator).to(DEVICE)
    return (
        None if parts == "hidden" else attention,
        None if parts == "attention" else wide[:, 3 * width :],
    )


@settings(max_examples=10, deadline=None, phases=NO_SHRINKING)
@given(STREAMS, WIDTHS, PARTS, SEEDS, CODES)
def test_the_kernel_agrees_with_float64(
    streams: Streams, width: int, parts: str, seed: int, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    given_parts = inputs(streams, width, parts, seed)
    wide = [None if part is None else part.double() for part in given_parts]
    exact, _ = gelu_concat_reference(*wide, streams, None, torch.float64)
    y, none = gelu_concat_triton(*given_parts, streams, None)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert none.numel() == 0
    codes, scales = gelu_concat_triton(*given_parts, streams, dtype)
    assert_codes_stand_for(codes, scales, exact)


@settings(max_examples=10, deadline=None, phases=NO_SHRINKING)
@given(STREAMS, WIDTHS, SEEDS)
def test_attention_comes_first_and_in_the_order_of_the_streams(
    streams: Streams, width: int, seed: int
) -> None:
    attention, hidden = inputs(streams, width, "both", seed)
    assert attention is not None
    assert hidden is not None
    y, _ = gelu_concat(attention, hidden, streams, None)
    assert torch.equal(y[:, :width], streams.by_stream(attention))
    expected = torch.nn.functional.gelu(hidden, approximate="tanh")
    torch.testing.assert_close(y[:, width:], expected, rtol=1e-5, atol=1e-6)


def test_the_operator_passes_pytorchs_own_checks() -> None:
    streams = Streams(2, 1, 2)
    for parts in ("both", "attention", "hidden"):
        for codes in (None, FP8, torch.int8):
            arguments = (*inputs(streams, 16, parts, 0), list(streams), codes)
            torch.library.opcheck(gelu_concat, arguments)
