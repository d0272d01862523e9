"""Operations that torch.onnx would not export as exactly: FP8 linears, and attention.

A linear whose weight is FP8 codes and whose input is rounded to FP8 with one calibrated scale:

    scale = amax / 448        codes = round(clamp(x / scale))        y = (codes · scale) Wᵀ + b

In an ONNX graph these are QuantizeLinear and DequantizeLinear (opset 19 and later: the type of the
zero point is that of the codes), which a builder fuses with the product into an FP8 one. In torch
it rounds in the same way, in float32, and multiplies in the activations' dtype.

Scales are rounded to the weight's dtype before the codes are made, because QuantizeLinear needs its
scale in its input's dtype: cast a model first and swap then. Casting afterwards, up to float32,
changes no value.

Attention, with its scale as exact as sixteen bits allow:

    softmax(Q Kᵀ / √d) V        as        softmax((a·Q) (b·K)ᵀ) V        with a·b ≈ 1/√d

Both factors are constants in the graph's dtype. Where both are d^-¼ rounded to bfloat16, as
torch.onnx has them, all logits of FLUX.1 (d = 128) are 0.3 % too small. The product of two
*different* bfloat16 numbers is 0.01 % off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.engines.tensorrt.packages import needed
from hasten.errors import EngineError
from hasten.kernels.quantize import FP8, LIMITS, TINY, dequantize

__all__ = ["Amax", "QdqLinear", "factors", "swap", "translation"]

LIMIT = LIMITS[FP8]
BITS = {"BFLOAT16": 8, "FLOAT16": 11}  # significant ones, the hidden one among them
ROWS_AT_ONCE = 1024  # of a weight, in float32: bounds the memory that codes are made in


@dataclass(frozen=True, eq=False)
class Amax:
    """Largest absolute input and weight of a linear.

    smooth: K factors that inputs are multiplied and weights divided by (SmoothQuant, Xiao et al.,
    arXiv:2211.10438), or None; the two maxima are those of what comes out of that.
    """

    input: float
    weight: float
    smooth: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Amax):
            return NotImplemented
        if (self.input, self.weight) != (other.input, other.weight):
            return False
        if self.smooth is None or other.smooth is None:
            return self.smooth is other.smooth
        return torch.equal(self.smooth, other.smooth)

    __hash__ = None  # type: ignore[assignment]


class QdqLinear(nn.Module):
    """Stands in for a linear. `weight` is N × K codes; the scales and zeros are 0-dim.

    `input_scale`, `weight_scale` and `smooth` (K, or None) have the original weight's dtype.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    input_scale: Tensor
    input_zero: Tensor
    smooth: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, amax: Amax) -> None:
        """weight: N × K, floating-point, left as it is; the bias is shared."""
        super().__init__()
        weight = weight.detach()
        self.out_features, self.in_features = weight.shape
        smooth = amax.smooth
        if smooth is not None:
            smooth = torch.empty_like(weight[0]).copy_(smooth)
        self.register_buffer("smooth", smooth)
        for side, largest in (("weight", amax.weight), ("input", amax.input)):
            self.register_buffer(f"{side}_scale", _scale(largest, weight))
            zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
            self.register_buffer(f"{side}_zero", zero.to(FP8))
        self.register_buffer("weight", self._weight_codes(weight))
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, amax: Amax) -> Self:
        return cls(linear.weight, linear.bias, amax)

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        if self.smooth is not None:
            x = x * self.smooth
        if torch.onnx.is_in_onnx_export():
            scale, zero = self.input_scale, self.input_zero
            codes = _node("QuantizeLinear", x, scale, zero, FP8)
            x = _node("DequantizeLinear", codes, scale, zero, x.dtype)
            weight = _node(
                "DequantizeLinear", self.weight, self.weight_scale, self.weight_zero, x.dtype
            )
        else:
            x = dequantize(_codes(x, self.input_scale), self.input_scale.float(), x.dtype)
            weight = dequantize(self.weight, self.weight_scale.float(), x.dtype)
        return nn.functional.linear(x, weight, self.bias)

    def _weight_codes(self, weight: Tensor) -> Tensor:
        codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
        for first in range(0, len(weight), ROWS_AT_ONCE):
            rows = weight[first : first + ROWS_AT_ONCE].float()
            if self.smooth is not None:
                rows = rows / self.smooth.float()
            codes[first : first + ROWS_AT_ONCE] = _codes(rows, self.weight_scale)
        return codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Codes move with the model and keep their dtype under `.to(dtype)`."""

        def apply(tensor: Tensor) -> Tensor:
            if tensor.dtype != FP8:
                return fn(tensor)
            return fn(tensor.view(torch.int8)).view(FP8)  # integers are only moved

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self


def swap(module: nn.Module, amax: Mapping[str, Amax]) -> None:
    """Replace every linear that `amax` names in the module, one at a time.

    Raises EngineError where a name is no plain linear of the module, before any is replaced.
    """
    linears = dict(module.named_modules())
    wrong = [name for name in amax if type(linears.get(name)) is not nn.Linear]
    if wrong:
        raise EngineError(
            f"{len(wrong)} calibrated layers are no plain linears of this model, the first is "
            f"{wrong[0]}",
            "calibrate this model; load it in bfloat16 or float32, not quantised",
        )
    del linears
    for name, largest in amax.items():
        module.set_submodule(name, QdqLinear.from_linear(_linear(module, name), largest))


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _scale(amax: float, like: Tensor) -> Tensor:
    """The scale with which values up to `amax` just fit, 0-dim, rounded to the dtype of `like`."""
    scale = torch.tensor(max(amax, TINY) / LIMIT, dtype=torch.float32, device=like.device)
    return scale.to(like.dtype).clamp(min=torch.finfo(like.dtype).tiny)


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    """What lies beyond 448 · scale becomes ±448; what is not a number stays so."""
    return (x.float() / scale.float()).clamp(-LIMIT, LIMIT).to(FP8)


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
