from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference, qk_norm_rope_triton
from hasten.kernels.streams import Streams
from tests.kernels.cases import DEVICE, NO_SHRINKING, SEEDS, STREAMS

HEADS = st.sampled_from([1, 3, 4])
HEAD_DIMS = st.sampled_from([2, 16, 48])


def inputs(
    streams: Streams, heads: int, head_dim: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys come as columns of a wider projection."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(streams.rows, 4 * heads * head_dim, generator=generator)
    weights = torch.randn(4, head_dim, generator=generator)
    angles = 6 * torch.rand(streams.text + streams.image, head_dim // 2, generator=generator)
    cos, sin = (f(angles).repeat_interleave(2, 1).to(DEVICE) for f in (torch.cos, torch.sin))
    return wide.to(DEVICE)[:, : 2 * heads * head_dim], weights.to(DEVICE), cos, sin


@settings(max_examples=10, deadline=None, phases=NO_SHRINKING)
@given(STREAMS, HEADS, HEAD_DIMS, SEEDS)
def test_the_kernel_agrees_with_float64(
    streams: Streams, heads: int, head_dim: int, seed: int
) -> None:
    pytest.importorskip("triton")
    qk, weights, cos, sin = inputs(streams, heads, head_dim, seed)
    exact = qk_norm_rope_reference(qk.double(), weights, cos, sin, streams, 1e-6, torch.float64)
    for values, expected in zip(
        qk_norm_rope_triton(qk, weights, cos, sin, streams, 1e-6), exact, strict=True
    ):
        assert values.shape == (streams.batch, streams.text + streams.image, heads, head_dim)
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None, phases=NO_SHRINKING)
@given(STREAMS, HEADS, HEAD_DIMS, SEEDS)
def test_the_reference_is_what_diffusers_does(
    streams: Streams, heads: int, head_dim: int, seed: int
) -> None:
    """RMSNorm of each stream with its own weights, joined, then Diffusers' rotary embedding."""
    from diffusers.models.embeddings import apply_rotary_emb

    qk, weights, cos, sin = inputs(streams, heads, head_dim, seed)
    text, image = qk[: streams.text_rows], qk[streams.text_rows :]
    got = qk_norm_rope_reference(qk, weights, cos, sin, streams, 1e-6)
    for which in range(2):
        parts = []
        for rows, tokens, weight in ((text, streams.text, 0), (image, streams.image, 2)):
            column = which * heads * head_dim
            values = rows[:, column : column + heads * head_dim]
            values = values.reshape(streams.batch, tokens, heads, head_dim)
            normed = torch.nn.functional.rms_norm(
                values, (head_dim,), weights[weight + which], eps=1e-6
            )
            parts.append(normed)
        joined = torch.cat(parts, dim=1)
        expected = apply_rotary_emb(joined, (cos, sin), sequence_dim=1)
        torch.testing.assert_close(got[which], expected, rtol=1e-5, atol=1e-6)


def test_the_operator_passes_pytorchs_own_checks() -> None:
    streams = Streams(2, 1, 2)
    arguments = (*inputs(streams, 2, 16, 0), list(streams), 1e-6)
    torch.library.opcheck(qk_norm_rope, arguments)
