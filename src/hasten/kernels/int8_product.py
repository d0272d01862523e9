"""Product of int8 codes, with scales and bias applied before the result is written.

    y[m, n] = (Σ_k codes[m, k] · weight[n, k]) · scale[m] · weight_scale[n] + bias[n]

The sum is exact in int32. The rest is computed in float32 and rounded once to y's dtype. In
contrast, `torch._int_mm` writes the int32 sums, four bytes each, which a second pass has to read.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.triton_or_none import available, jit, tl

Tile = tuple[int, int, int, int, int]
# Rows and columns of y per program, depth of a load, warps, loads in flight. First the fastest ones
# on an H100 at FLUX.1's shapes, then smaller ones that need less shared memory.
TILES: tuple[Tile, ...] = (
    (128, 128, 128, 4, 3),
    (64, 128, 128, 4, 4),
    (128, 128, 64, 4, 4),
    (64, 64, 64, 4, 3),
)
FEWEST_ROWS = 17  # the minimum of `torch._int_mm` on a GPU
GROUP = 16  # row tiles that share their columns of the weight in cache


@torch.library.custom_op("hasten::int8_product", mutates_args=("out",))
def int8_product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Write the product to `out`.

    Args:
        codes: Codes of the activations, M × K, int8, contiguous rows.
        scale: Scales of the activations, M × 1 or 0-dim, float32.
        weight: Codes of the weight, N × K, int8, contiguous rows.
        weight_scale: Scales of the weight, N × 1 or 0-dim, float32.
        bias: N values, or None.
        out: M × N of any floating-point dtype, contiguous.
    """
    out.copy_(int8_product_reference(codes, scale, weight, weight_scale, bias))


@int8_product.register_fake
def _(*_: Any) -> None:
    """The operator returns nothing, so there is nothing to fake."""


def int8_product_reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The operation in plain torch, M × N in `dtype` (float32 or float64)."""
    rows = len(codes)
    if codes.is_cuda and rows < FEWEST_ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, FEWEST_ROWS - rows))
    sums = torch._int_mm(codes, weight.t())[:rows]
    y = sums.to(dtype) * scale.to(dtype) * weight_scale.to(dtype).t()
    return y if bias is None else y + bias.to(dtype)


def int8_product_triton(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """The Triton kernel, one program per tile of y."""
    rows, depth = codes.shape
    columns = len(weight)
    tile = tile or tile_for(rows, columns, *_device_limits(codes.device))
    block_rows, block_columns, block_depth, warps, stages = tile
    _kernel[(_programs(rows, columns, tile),)](
        codes, scale, weight, weight_scale, weight_scale if bias is None else bias, out,
        rows, columns, depth, codes.stride(0), weight.stride(0),
        int(scale.ndim > 0), int(weight_scale.ndim > 0),
        HAS_BIAS=bias is not None, EVEN=depth % block_depth == 0,
        BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, BLOCK_DEPTH=block_depth, GROUP=GROUP,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def tile_for(rows: int, columns: int, shared_memory: int, processors: int) -> Tile:
    """Select the tile size of a product.

    Args:
        rows: Rows of y.
        columns: Columns of y.
        shared_memory: Bytes of shared memory per processor.
        processors: Number of processors.

    Returns:
        The first tile that gives every processor at least one program and whose loads in flight fit
        into the shared memory; else the smallest tile that fits.
    """
    fitting = [tile for tile in TILES if _loads_in_flight(tile) <= shared_memory] or TILES[-1:]
    busy = (tile for tile in fitting if _programs(rows, columns, tile) >= processors)
    return next(busy, fitting[-1])


def _loads_in_flight(tile: Tile) -> int:
    rows, columns, depth, _, loads = tile
    return (rows + columns) * depth * loads


def _programs(rows: int, columns: int, tile: Tile) -> int:
    return -(-rows // tile[0]) * -(-columns // tile[1])


if available():  # else the reference runs
    int8_product.register_kernel("cuda")(int8_product_triton)


@cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.multi_processor_count


@jit
def _kernel(
    codes_ptr, scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    rows, columns, depth, codes_stride, weight_stride, scale_stride, weight_scale_stride,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    in_group = GROUP * column_tiles
    first = (tile // in_group) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + (tile % in_group) % height
    column_tile = (tile % in_group) // height

    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, BLOCK_DEPTH)
    # Rows and columns beyond the edge wrap around and are not written.
    left = codes_ptr + (row % rows).to(tl.int64)[:, None] * codes_stride + k[None, :]
    right = weight_ptr + (column % columns).to(tl.int64)[None, :] * weight_stride + k[:, None]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.int32)
    for start in range(0, depth, BLOCK_DEPTH):
        if EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, k[None, :] < depth - start, 0)
            b = tl.load(right, k[:, None] < depth - start, 0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        left += BLOCK_DEPTH
        right += BLOCK_DEPTH

    inside = (row < rows)[:, None] & (column < columns)[None, :]
    scale = tl.load(scale_ptr + row * scale_stride, row < rows, 0.0)
    weight_scale = tl.load(weight_scale_ptr + column * weight_scale_stride, column < columns, 0.0)
    y = sums.to(tl.float32) * scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)[None, :]
    out = y_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), inside)
