"""Operations that torch.onnx would export less exactly: FP8 linears and attention.

In an FP8 linear, the weight is FP8 codes and the input is rounded to FP8 with one calibrated scale:

    scale = amax / 448        codes = round(clamp(x / scale))        y = (codes · scale) Wᵀ + b

In an ONNX graph, these are QuantizeLinear and DequantizeLinear (opset 19 and later: the zero point
has the type of the codes), which a builder fuses with the product into an FP8 product. In torch,
values are rounded in the same way, in float32, and multiplied in the activations' dtype.

Scales are rounded to the weight's dtype before the codes are computed, because QuantizeLinear needs
its scale in its input's dtype. So cast a model before `swap`; casting it to float32 afterwards
changes no value.

Attention is exported with a scale that is as exact as sixteen bits allow:

    softmax(Q Kᵀ / √d) V        as        softmax((a·Q) (b·K)ᵀ) V        with a·b ≈ 1/√d

Both factors are constants in the graph's dtype. torch.onnx uses d^-¼ rounded to bfloat16 for both,
so all logits of FLUX.1 (d = 128) are 0.3 % too small. The product of two *different* bfloat16
numbers has an error of only 0.01 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.engines.tensorrt.packages import needed
from hasten.errors import EngineError
from hasten.kernels.quantize import FP8, dequantize, fp8_codes, fp8_scale
from hasten.quantization.linear import QuantizedLinear

BITS = {"BFLOAT16": 8, "FLOAT16": 11}  # significant bits, including the hidden one
ROWS_AT_ONCE = 1024  # rows of a weight quantised at once, which limits the memory in float32


@dataclass(frozen=True, eq=False)
class Amax:
    """The largest absolute input and weight of a linear.

    Attributes:
        input: The largest absolute input, after the multiplication by `smooth`.
        weight: The largest absolute weight, after the division by `smooth`.
        smooth: K factors that inputs are multiplied and weights divided by (SmoothQuant, Xiao et
            al., arXiv:2211.10438), or None.
    """

    input: float
    weight: float
    smooth: Tensor | None = None


def scales_of(amax: Amax, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The buffers of a `QdqLinear` for a weight of this dtype, without the codes."""

    def scale(largest: float) -> Tensor:
        return fp8_scale(largest, device).to(dtype).clamp(min=torch.finfo(dtype).tiny)

    def zero() -> Tensor:
        return torch.zeros((), dtype=dtype, device=device).to(FP8)

    return {
        "smooth": None if amax.smooth is None else amax.smooth.to(device, dtype),
        "weight_scale": scale(amax.weight),
        "weight_zero": zero(),
        "input_scale": scale(amax.input),
        "input_zero": zero(),
    }


def weight_codes(weight: Tensor, scale: Tensor, smooth: Tensor | None) -> Tensor:
    """FP8 codes of a weight (N × K) with the scale and factors of `scales_of`."""
    codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    for first in range(0, len(weight), ROWS_AT_ONCE):
        rows = weight[first : first + ROWS_AT_ONCE].float()
        if smooth is not None:
            rows = rows / smooth.float()
        codes[first : first + ROWS_AT_ONCE] = fp8_codes(rows, scale.float())
    return codes


class QdqLinear(QuantizedLinear):
    """An FP8 linear for export.

    Attributes:
        weight: Codes, N × K.
        weight_scale: 0-dim, in the original weight's dtype.
        input_scale: 0-dim, in the original weight's dtype.
        weight_zero: The zero point of the weight, 0-dim.
        input_zero: The zero point of the input, 0-dim.
        smooth: K factors in the original weight's dtype, or None.
    """

    weight_zero: Tensor
    input_zero: Tensor
    smooth: Tensor | None
    fixed_dtype = ("weight", "weight_zero", "input_zero")

    @classmethod
    def calibrated(cls, linear: nn.Linear, amax: Amax) -> Self:
        """Quantise a linear of any floating-point dtype. It is not changed; its bias is shared."""
        weight = linear.weight.detach()
        scales = scales_of(amax, weight.dtype, weight.device)
        codes = weight_codes(weight, scales["weight_scale"], scales["smooth"])
        module = cls(codes, scales["weight_scale"], linear.bias, scales["input_scale"])
        for name in ("smooth", "weight_zero", "input_zero"):
            module.register_buffer(name, scales[name])
        return module

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        input_scale = self.input_scale
        assert input_scale is not None  # set by `calibrated`
        if self.smooth is not None:
            x = x * self.smooth
        if torch.onnx.is_in_onnx_export():
            codes = _node("QuantizeLinear", x, input_scale, self.input_zero, FP8)
            x = _node("DequantizeLinear", codes, input_scale, self.input_zero, x.dtype)
            weight = _node(
                "DequantizeLinear", self.weight, self.weight_scale, self.weight_zero, x.dtype
            )
        else:
            x = dequantize(fp8_codes(x, input_scale.float()), input_scale.float(), x.dtype)
            weight = dequantize(self.weight, self.weight_scale.float(), x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def swap(module: nn.Module, amax: Mapping[str, Amax]) -> None:
    """Replace every linear in `amax` by a `QdqLinear`, one at a time.

    Raises:
        EngineError: A name is not a plain linear of the module. Nothing has been replaced.
    """
    linears: dict[str, Any] = dict(module.named_modules())
    wrong = [name for name in amax if type(linears.get(name)) is not nn.Linear]
    if wrong:
        raise EngineError(
            f"{len(wrong)} calibrated layers are not plain linears of this model; the first is "
            f"{wrong[0]}",
            "calibrate this model; load it in bfloat16 or float32, not quantised",
        )
    for name, largest in amax.items():
        module.set_submodule(name, QdqLinear.calibrated(linears.pop(name), largest))


def _node(op: str, x: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    node: Tensor = torch.onnx.ops.symbolic(op, (x, scale, zero), dtype=dtype, shape=x.shape)
    return node


@cache
def factors(scale: float, bits: int) -> tuple[float, float]:
    """Two numbers of `bits` significant bits, near √scale, whose product is closest to `scale`."""
    root = 2.0 ** math.floor(math.log2(scale) / 2)  # the power of two at or below the square root
    half = 1 << (bits - 1)
    firsts = [root * mantissa / half for mantissa in range(half, 2 * half)]
    pairs = [(first, _rounded(scale / first, bits)) for first in firsts]

    def error(pair: tuple[float, float]) -> tuple[float, float]:
        return abs(pair[0] * pair[1] - scale), abs(math.log(pair[0] / pair[1]))

    return min(pairs, key=error)


def _rounded(value: float, bits: int) -> float:
    """Round a value to that many significant bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**bits), exponent - bits)


def translation() -> dict[Any, Any]:
    """The `custom_translation_table` for torch.onnx.export."""
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
        """Attention of queries, keys and values, B×heads×L×d each."""
        if attn_mask is not None or dropout_p or is_causal or enable_gqa:
            raise EngineError(
                "attention with a mask, dropout or grouped heads cannot be exported",
                "export a FLUX.1 transformer in eval mode with its original attention processors",
            )
        if scale is None:
            scale = int(query.shape[-1]) ** -0.5
        first, second = factors(scale, BITS[query.dtype.name])
        queries = op.Mul(query, op.CastLike(first, query))
        keys = op.Mul(op.Transpose(key, perm=[0, 1, 3, 2]), op.CastLike(second, key))
        return op.MatMul(op.Softmax(op.MatMul(queries, keys), axis=-1), value)

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}
