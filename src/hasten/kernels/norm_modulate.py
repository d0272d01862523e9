"""Gated residual, LayerNorm, modulation and row-wise quantisation in one pass over each row.

    x ← x + gate · delta                      (optional; x changes in place)
    y = LayerNorm(x) · (1 + scale) + shift    (no affine weights; adaLN-Zero, Peebles & Xie 2023)
    codes, row scale = y / (max|y| / limit)   (optional; else y in x's dtype)

limit: 448 for FP8, 127 for int8. Everything between load and store is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels.quantize import LIMITS, TINY, quantize_rows
from hasten.kernels.streams import Streams
from hasten.kernels.triton_or_none import jit, next_power_of_2, tl, to_codes

WARPS = 4  # per program; fastest on an H100 at D = 3072


def norm_modulate_reference(
    x: Tensor,
    delta: Tensor | None,
    table: Tensor,
    offsets: Sequence[int],
    streams: Sequence[int],
    codes: torch.dtype | None,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The operation in plain torch, computed in `dtype`.

    Args:
        x: rows × D in the order of `Streams(*streams)`; changed in place if there is a delta.
        delta: rows × D, or None.
        table: Modulations, batch × columns.
        offsets: First columns of shift, scale and gate of the text rows, then of the image rows,
            each D wide. The gates are read only with a delta.
        streams: The fields of `Streams`.
        codes: float8_e4m3fn, int8, or None for plain values.
        eps: Of the LayerNorm.
        dtype: The dtype of intermediate results.

    Returns:
        y, rows × D, in x's dtype with an empty tensor, or in `codes` with row scales (rows × 1,
        float32).
    """
    rows = Streams(*streams)
    width = x.shape[1]
    shift, scale, gate = (
        rows.per_row(*(table[:, o : o + width].to(dtype) for o in (offsets[i], offsets[i + 3])))
        for i in range(3)
    )
    exact = x.to(dtype)
    if delta is not None:
        exact = exact + gate * delta.to(dtype)
        x.copy_(exact)
    normed = torch.nn.functional.layer_norm(exact, (width,), eps=eps)
    y = normed * (1 + scale) + shift
    if codes is not None:
        return quantize_rows(y, codes)
    return y.to(x.dtype), x.new_empty(0, dtype=torch.float32)


norm_modulate = torch.library.custom_op(
    "hasten::norm_modulate",
    mutates_args=("x",),
    schema="(Tensor(a!) x, Tensor? delta, Tensor table, SymInt[] offsets, SymInt[] streams, "
    "ScalarType? codes, float eps) -> (Tensor, Tensor)",
)(norm_modulate_reference)


@norm_modulate.register_fake
def _(x, delta, table, offsets, streams, codes, eps):
    return _outputs(x, codes)


@norm_modulate.register_kernel("cuda")
def norm_modulate_triton(
    x: Tensor,
    delta: Tensor | None,
    table: Tensor,
    offsets: Sequence[int],
    streams: Sequence[int],
    codes: torch.dtype | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The Triton kernel, one program per row."""
    rows = Streams(*streams)
    y, scales = _outputs(x, codes)
    _kernel[(rows.rows,)](
        x, x if delta is None else delta, table, y, table if codes is None else scales,
        x.stride(0), x.stride(0) if delta is None else delta.stride(0), table.stride(0),
        *offsets, rows.text_rows, max(rows.text, 1), rows.image, x.shape[1], eps, TINY,
        BLOCK=next_power_of_2(x.shape[1]), HAS_DELTA=delta is not None,
        LIMIT=0.0 if codes is None else LIMITS[codes], INT8=codes == torch.int8,
        num_warps=WARPS,
    )  # fmt: skip
    return y, scales


def _outputs(x: Tensor, codes: torch.dtype | None) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=codes or x.dtype, device=x.device)
    return y, x.new_empty((len(x), 1) if codes else 0, dtype=torch.float32)


@jit
def _kernel(
    x_ptr, delta_ptr, table_ptr, y_ptr, scales_ptr,
    x_stride, delta_stride, table_stride,
    text_shift, text_scale, text_gate, image_shift, image_scale, image_gate,
    text_rows, text_tokens, image_tokens, width, eps, tiny,
    BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, LIMIT: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    is_text = row < text_rows
    sequence = tl.where(is_text, row // text_tokens, (row - text_rows) // image_tokens)
    modulation = table_ptr + sequence * table_stride + columns

    x = tl.load(x_ptr + row * x_stride + columns, inside, 0.0).to(tl.float32)
    if HAS_DELTA:
        gate = tl.load(modulation + tl.where(is_text, text_gate, image_gate), inside, 0.0)
        delta = tl.load(delta_ptr + row * delta_stride + columns, inside, 0.0)
        x += gate.to(tl.float32) * delta.to(tl.float32)
        tl.store(x_ptr + row * x_stride + columns, x.to(x_ptr.dtype.element_ty), inside)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    shift = tl.load(modulation + tl.where(is_text, text_shift, image_shift), inside, 0.0)
    scale = tl.load(modulation + tl.where(is_text, text_scale, image_scale), inside, 0.0)
    y = centred * inverse * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    out = y_ptr + row * width + columns
    if LIMIT > 0:
        largest = tl.maximum(tl.max(tl.abs(y), 0), tiny)
        tl.store(scales_ptr + row, largest / LIMIT)
        y = to_codes(y * (LIMIT / largest), INT8)
    tl.store(out, y.to(y_ptr.dtype.element_ty), inside)
