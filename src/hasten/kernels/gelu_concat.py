"""Concatenates attention output and gelu of the MLP's hidden rows, optionally quantised per row.

    y = [attention, gelu(hidden)]             (either may be absent; gelu's tanh approximation)
    codes, row scale = y / (max|y| / limit)   (optional; else y in the inputs' dtype)

limit: 448 for FP8, 127 for int8. tanh-gelu(x) = x · sigmoid(2 · sqrt(2/π) · (x + 0.044715 x³))
(Hendrycks & Gimpel 2016). Everything between load and store is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels.quantize import LIMITS, TINY, quantize_rows
from hasten.kernels.streams import Streams
from hasten.kernels.triton_or_none import jit, next_power_of_2, tl, to_codes

WARPS = 16  # per program; fastest on an H100 at M = 12288
NARROW_WARPS = 8  # without an MLP


def gelu_concat_reference(
    attention: Tensor | None,
    hidden: Tensor | None,
    streams: Sequence[int],
    codes: torch.dtype | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The operation in plain torch, computed in `dtype`.

    Args:
        attention: batch × tokens × D, ordered by sequence; None if absent.
        hidden: rows × M in the order of `Streams(*streams)`, rows may be strided; None if absent.
        streams: The fields of `Streams`.
        codes: float8_e4m3fn, int8, or None for plain values.
        dtype: The dtype of intermediate results.

    Returns:
        y, rows × (D + M), in the inputs' dtype with an empty tensor, or in `codes` with row scales
        (rows × 1, float32).
    """
    parts = []
    if attention is not None:
        parts.append(Streams(*streams).by_stream(attention).to(dtype))
    if hidden is not None:
        parts.append(torch.nn.functional.gelu(hidden.to(dtype), approximate="tanh"))
    y = torch.cat(parts, dim=1)
    if codes is not None:
        return quantize_rows(y, codes)
    given = _either(attention, hidden)
    return y.to(given.dtype), given.new_empty(0, dtype=torch.float32)


gelu_concat = torch.library.custom_op(
    "hasten::gelu_concat",
    mutates_args=(),
    schema="(Tensor? attention, Tensor? hidden, SymInt[] streams, ScalarType? codes) "
    "-> (Tensor, Tensor)",
)(gelu_concat_reference)


@gelu_concat.register_fake
def _(attention, hidden, streams, codes):
    return _outputs(attention, hidden, Streams(*streams), codes)


@gelu_concat.register_kernel("cuda")
def gelu_concat_triton(
    attention: Tensor | None,
    hidden: Tensor | None,
    streams: Sequence[int],
    codes: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The Triton kernel, one program per row."""
    rows = Streams(*streams)
    y, scales = _outputs(attention, hidden, rows, codes)
    given = _either(attention, hidden)
    left = 0 if attention is None else attention.shape[2]
    right = 0 if hidden is None else hidden.shape[1]
    _kernel[(rows.rows,)](
        given if attention is None else attention, given if hidden is None else hidden,
        y, given if codes is None else scales,
        0 if attention is None else attention.stride(0),
        0 if attention is None else attention.stride(1),
        0 if hidden is None else hidden.stride(0),
        rows.text_rows, max(rows.text, 1), rows.image, left, right, TINY,
        LEFT=next_power_of_2(max(left, 1)), PART=next_power_of_2(max(-(-right // 3), 1)),
        HAS_LEFT=left > 0, HAS_RIGHT=right > 0,
        LIMIT=0.0 if codes is None else LIMITS[codes], INT8=codes == torch.int8,
        num_warps=WARPS if right else NARROW_WARPS,
    )  # fmt: skip
    return y, scales


def _either(attention: Tensor | None, hidden: Tensor | None) -> Tensor:
    given = hidden if attention is None else attention
    assert given is not None, "neither attention nor hidden was given"
    return given


def _outputs(
    attention: Tensor | None, hidden: Tensor | None, rows: Streams, codes: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    given = _either(attention, hidden)
    width = sum(part.shape[-1] for part in (attention, hidden) if part is not None)
    y = given.new_empty((rows.rows, width), dtype=codes or given.dtype)
    return y, given.new_empty((rows.rows, 1) if codes else 0, dtype=torch.float32)


@jit
def _kernel(
    left_ptr, right_ptr, y_ptr, scales_ptr,
    sequence_stride, token_stride, right_stride,
    text_rows, text_tokens, image_tokens, left_width, right_width, tiny,
    LEFT: tl.constexpr, PART: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, LIMIT: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out = y_ptr + row * (left_width + right_width)
    largest = tiny
    if HAS_LEFT:
        is_text = row < text_rows
        after_text = row - text_rows
        sequence = tl.where(is_text, row // text_tokens, after_text // image_tokens)
        only_image = tl.where(text_rows > 0, text_tokens, 0)
        position = tl.where(is_text, row % text_tokens, only_image + after_text % image_tokens)
        in_left = tl.arange(0, LEFT) < left_width
        at = sequence * sequence_stride + position * token_stride + tl.arange(0, LEFT)
        left = tl.load(left_ptr + at, in_left, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(left), 0))
    if HAS_RIGHT:  # three parts, because FLUX.1's 12288 columns are three power-of-two blocks
        columns = tl.arange(0, PART)
        hidden = right_ptr + row * right_stride + columns
        first = _gelu(hidden, columns, right_width)
        second = _gelu(hidden + PART, columns + PART, right_width)
        third = _gelu(hidden + 2 * PART, columns + 2 * PART, right_width)
        largest = tl.maximum(largest, tl.max(tl.abs(first), 0))
        largest = tl.maximum(largest, tl.max(tl.abs(second), 0))
        largest = tl.maximum(largest, tl.max(tl.abs(third), 0))
    inverse = 1.0
    if LIMIT > 0:
        tl.store(scales_ptr + row, largest / LIMIT)
        inverse = LIMIT / largest
    if HAS_LEFT:
        left = to_codes(left * inverse, INT8)
        tl.store(out + tl.arange(0, LEFT), left.to(y_ptr.dtype.element_ty), in_left)
    if HAS_RIGHT:
        right = out + left_width
        _store(right, first * inverse, columns, right_width, INT8)
        _store(right, second * inverse, columns + PART, right_width, INT8)
        _store(right, third * inverse, columns + 2 * PART, right_width, INT8)


@jit
def _gelu(at, columns, width):
    x = tl.load(at, columns < width, 0.0).to(tl.float32)
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@jit
def _store(row, values, columns, width, INT8: tl.constexpr):
    tl.store(row + columns, to_codes(values, INT8).to(row.dtype.element_ty), columns < width)
