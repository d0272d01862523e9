"""RMSNorm and rotary embedding of queries and keys, read from the rows of a projection.

    q ← rope(q / sqrt(mean(q²) + eps) · weight), and k likewise

RoPE rotates pairs of neighbouring channels (Su et al. 2021, eq. 34). Everything between load and
store is float32. Inputs are in the order of `Streams`; results are ordered by sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels.streams import Streams
from hasten.kernels.triton_or_none import jit, next_power_of_2, tl

WARPS = 8  # per program; fastest on an H100 at 24 heads of 128


def qk_norm_rope_reference(
    qk: Tensor,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    streams: Sequence[int],
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The operation in plain torch, computed in `dtype`.

    Args:
        qk: rows × (2 · heads · head_dim), queries then keys, ordered by head; rows may be strided.
        weights: 4 × head_dim, for text queries, text keys, image queries and image keys.
        cos: tokens × head_dim in float32, text tokens first, each value twice (once per channel of
            a pair).
        sin: Like cos.
        streams: The fields of `Streams`.
        eps: Of the RMSNorm.
        dtype: The dtype of intermediate results.

    Returns:
        Queries and keys, each batch × tokens × heads × head_dim.
    """
    rows = Streams(*streams)
    width = weights.shape[1]
    exact = qk.to(dtype).reshape(len(qk), 2, -1, width)  # rows × (queries, keys) × heads × head_dim
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    text, image = weights.to(dtype).view(2, 1, 2, 1, -1)
    exact = torch.cat([exact[: rows.text_rows] * text, exact[rows.text_rows :] * image])
    ordered = rows.by_sequence(exact)
    even, odd = ordered[..., 0::2], ordered[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    cosine, sine = (angles.to(dtype)[:, None, None] for angles in (cos, sin))
    q, k = (ordered * cosine + turned * sine).to(qk.dtype).unbind(2)
    return q.contiguous(), k.contiguous()


qk_norm_rope = torch.library.custom_op(
    "hasten::qk_norm_rope",
    mutates_args=(),
    schema="(Tensor qk, Tensor weights, Tensor cos, Tensor sin, SymInt[] streams, float eps) "
    "-> (Tensor, Tensor)",
)(qk_norm_rope_reference)


@qk_norm_rope.register_fake
def _(qk, weights, cos, sin, streams, eps):
    return _outputs(qk, weights, Streams(*streams))


@qk_norm_rope.register_kernel("cuda")
def qk_norm_rope_triton(
    qk: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, streams: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """The Triton kernel, one program per row."""
    rows = Streams(*streams)
    q, k = _outputs(qk, weights, rows)
    heads, width = q.shape[2:]
    _kernel[(rows.rows,)](
        qk, weights, cos, sin, q, k,
        qk.stride(0), rows.text_rows, max(rows.text, 1), rows.image, heads, width, eps,
        HEADS=next_power_of_2(heads), PAIRS=next_power_of_2(width // 2), num_warps=WARPS,
    )  # fmt: skip
    return q, k


def _outputs(qk: Tensor, weights: Tensor, rows: Streams) -> tuple[Tensor, Tensor]:
    width = weights.shape[1]
    shape = rows.batch, rows.text + rows.image, qk.shape[1] // (2 * width), width
    return qk.new_empty(shape), qk.new_empty(shape)


@jit
def _kernel(
    qk_ptr, weights_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr,
    stride, text_rows, text_tokens, image_tokens, heads, width, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    is_text = row < text_rows
    after_text = row - text_rows
    sequence = tl.where(is_text, row // text_tokens, after_text // image_tokens)
    only_image = tl.where(text_rows > 0, text_tokens, 0)
    position = tl.where(is_text, row % text_tokens, only_image + after_text % image_tokens)

    channel = tl.arange(0, 2 * PAIRS)
    pair = tl.arange(0, PAIRS)
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (channel[None, :] < width)
    at = head * width + channel[None, :]
    in_pair = 2 * pair < width
    cos = tl.load(cos_ptr + position * width + 2 * pair, in_pair, 0.0)[None, :]
    sin = tl.load(sin_ptr + position * width + 2 * pair, in_pair, 0.0)[None, :]
    out = (sequence * (only_image + image_tokens) + position) * heads * width
    for which in tl.static_range(2):
        x = tl.load(qk_ptr + row * stride + which * heads * width + at, inside, 0.0).to(tl.float32)
        weight_row = weights_ptr + (which + tl.where(is_text, 0, 2)) * width
        weight = tl.load(weight_row + channel, channel < width, 0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
        x = x * inverse[:, None] * weight[None, :]
        even, odd = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
        turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
        y = tl.reshape(turned, (HEADS, 2 * PAIRS))
        if which == 0:
            tl.store(q_ptr + out + at, y.to(q_ptr.dtype.element_ty), inside)
        else:
            tl.store(k_ptr + out + at, y.to(k_ptr.dtype.element_ty), inside)
