"""Attention as ONNX nodes, with its scale as exact as sixteen bits allow.

    softmax(Q Kᵀ / √d) V        as        softmax((a·Q) (b·K)ᵀ) V        with a·b ≈ 1/√d

Both factors are constants in the graph's dtype. Where both are d^-¼ rounded to bfloat16, as
torch.onnx has them, all logits of FLUX.1 (d = 128) come out 0.3 % too small. Of two *different*
bfloat16 numbers the product is 0.01 % off.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from hasten.engines.tensorrt.packages import needed
from hasten.errors import EngineError

__all__ = ["factors", "translation"]

BITS = {"BFLOAT16": 8, "FLOAT16": 11}  # significant ones, the hidden one among them


@cache
def factors(scale: float, bits: int) -> tuple[float, float]:
    """Two numbers of so many significant bits, near √scale, whose product is nearest to `scale`."""
    root = 2.0 ** math.floor(math.log2(scale) / 2)  # the power of two at or below the square root
    half = 1 << (bits - 1)
    firsts = [root * mantissa / half for mantissa in range(half, 2 * half)]
    pairs = [(first, _rounded(scale / first, bits)) for first in firsts]

    def error(pair: tuple[float, float]) -> tuple[float, float]:
        return abs(pair[0] * pair[1] - scale), abs(math.log(pair[0] / pair[1]))

    return min(pairs, key=error)


def _rounded(value: float, bits: int) -> float:
    """To so many significant bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**bits), exponent - bits)


def translation() -> dict[Any, Any]:
    """For torch.onnx.export's `custom_translation_table`."""
    op = needed("onnxscript").opset20

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """B×heads×L×d each."""
        if attn_mask is not None or dropout_p or is_causal or enable_gqa:
            raise EngineError(
                "attention with a mask, dropout or grouped heads cannot be exported",
                "export a FLUX.1 transformer with its own attention processors, in eval mode",
            )
        if scale is None:
            scale = int(query.shape[-1]) ** -0.5
        first, second = factors(scale, BITS[query.dtype.name])
        queries = op.Mul(query, op.CastLike(first, query))
        keys = op.Mul(op.Transpose(key, perm=[0, 1, 3, 2]), op.CastLike(second, key))
        return op.MatMul(op.Softmax(op.MatMul(queries, keys), axis=-1), value)

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}
