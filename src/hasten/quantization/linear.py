"""Replacements of `nn.Linear` whose weight is stored as eight-bit codes.

    y = x Wᵀ + b        W ≈ weight · weight_scale        x ≈ codes · scale, computed at each call

| class            | weight codes | activations | product |
| ---------------- | ------------ | ----------- | ------- |
| Fp8Linear        | FP8          | FP8         | FP8, accumulated in float32 (`torch._scaled_mm`) |
| Int8Linear       | int8         | int8        | int8, accumulated in int32 (`int8_product`) |
| WeightOnlyLinear | FP8 or int8  | as they are | in the activations' dtype |
| EmulatedLinear   | any, with the same rounding | | in the activations' dtype, on any device |

Shapes: M rows (every token of every item), K inputs, N outputs. `weight` is N × K. `weight_scale`
is N × 1 (granularity "row": one scale per output channel, and one per token of the activations) or
0-dim ("tensor"), in float32. Both are buffers: a model's `dtype` is that of its parameters.

FP8 activations may have a calibrated scale instead, `input_scale` (0-dim, float32, a buffer), which
is used for every token of every call. Values beyond 448 · input_scale, including infinity, become
±448; NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from hasten.kernels.int8_product import int8_product
from hasten.kernels.quantize import (
    FP8,
    dequantize,
    fp8_codes,
    fp8_scale,
    quantize_rows,
    quantize_tensor,
)
from hasten.quantization.schemes import SCHEMES, Scheme
from hasten.recipe import Quantize

Granularity = Literal["row", "tensor"]


class QuantizedLinear(nn.Module):
    """Base class of the quantised linears.

    Attributes:
        weight: Codes, N × K.
        weight_scale: N × 1 or 0-dim, float32.
        input_scale: A calibrated scale of the activations (0-dim, float32); None computes it.
        bias: The original's bias.
        fixed_dtype: The buffers that `.to(dtype)` does not cast.
        default_codes: The default dtype of the codes.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    bias: nn.Parameter | None
    fixed_dtype: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "input_scale")
    default_codes: ClassVar[torch.dtype] = FP8

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: nn.Parameter | None,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", input_scale)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        granularity: Granularity = "row",
        dtype: torch.dtype | None = None,
        amax: float | None = None,
    ) -> Self:
        """Quantise a linear; the original is not changed.

        Args:
            linear: The original; its bias is shared.
            granularity: "row" or "tensor", for the scales.
            dtype: The codes' dtype; `default_codes` by default.
            amax: The largest absolute input, for a calibrated scale; None computes the scale at
                each call.
        """
        codes, scale = _codes(linear.weight.detach(), granularity, dtype or cls.default_codes)
        input_scale = None if amax is None else fp8_scale(amax, scale.device)
        return cls(codes, scale, linear.bias, input_scale)

    @property
    def granularity(self) -> Granularity:
        return "row" if self.weight_scale.ndim else "tensor"

    def extra_repr(self) -> str:
        static = "" if self.input_scale is None else ", calibrated input scale"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight={self.weight.dtype}, "
            f"scale per {self.granularity}{static}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move codes and scales with the model, but keep their dtype under `.to(dtype)`."""

        def apply(tensor: Tensor) -> Tensor:
            if not any(tensor is self._buffers[name] for name in self.fixed_dtype):
                return fn(tensor)
            integer = torch.int8 if tensor.dtype.itemsize == 1 else torch.int32
            return fn(tensor.view(integer)).view(tensor.dtype)  # integers are only moved

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self


class Fp8Linear(QuantizedLinear):
    """Weight and activations in float8_e4m3fn, if `Machine.quantize_problem` returns None."""

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        if self.input_scale is None:
            codes, scale = _codes(x, self.granularity, FP8)
        else:
            codes = fp8_codes(x.reshape(-1, self.in_features), self.input_scale)
            scale = self.input_scale
            if self.granularity == "row":  # the product needs row scales on both sides or neither
                scale = scale.repeat(len(codes), 1)
        # On CUDA, products with row scales support only bfloat16 outputs.
        dtype = torch.bfloat16 if x.is_cuda else x.dtype
        y = fp8_product(codes, scale, self.weight, self.weight_scale, self.bias, dtype=dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class Int8Linear(QuantizedLinear):
    """Weight and activations in int8; the product is exact, so only the codes have an error."""

    default_codes = torch.int8

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        codes, scale = _codes(x, self.granularity, torch.int8)
        y = x.new_empty(len(codes), self.out_features)
        int8_product(codes, scale, self.weight, self.weight_scale, self.bias, y)
        return y.reshape(*x.shape[:-1], self.out_features)


class WeightOnlyLinear(QuantizedLinear):
    """The weight as codes of either dtype, dequantised at each call: half the memory, no faster."""

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        weight = dequantize(self.weight, self.weight_scale, x.dtype)
        return nn.functional.linear(x, weight, self.bias)


class EmulatedLinear(QuantizedLinear):
    """Rounds like a scheme but multiplies in the activations' dtype.

    Attributes:
        weight: N × K in the original dtype, already rounded.
        codes: The scheme's dtype.
        activations: Whether the scheme also rounds activations.
    """

    fixed_dtype = ("weight_scale", "input_scale")
    codes: torch.dtype
    activations: bool

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        granularity: Granularity = "row",
        dtype: torch.dtype | None = None,
        amax: float | None = None,
        activations: bool = True,
    ) -> Self:
        """Quantise a linear like the other classes; `activations`: whether they are rounded too."""
        emulated = super().from_linear(linear, granularity, dtype, amax)
        emulated.codes, emulated.activations = emulated.weight.dtype, activations
        emulated.weight = dequantize(emulated.weight, emulated.weight_scale, linear.weight.dtype)
        return emulated

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        if self.input_scale is not None:
            x = dequantize(fp8_codes(x, self.input_scale), self.input_scale, x.dtype)
        elif self.activations:
            codes, scale = _codes(x, self.granularity, self.codes)
            x = dequantize(codes, scale, x.dtype).reshape(x.shape)
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        rounded = "weight and activations" if self.activations else "weight"
        return f"{super().extra_repr()}, {rounded} rounded as {self.codes}"


def linear_class(recipe: Quantize) -> type[QuantizedLinear]:
    """The class that replaces linears under a recipe's `[quantize]`."""
    kinds = (Fp8Linear, Int8Linear, WeightOnlyLinear)
    by_name: dict[str, type[QuantizedLinear]] = {kind.__name__: kind for kind in kinds}
    return EmulatedLinear if recipe.emulate else by_name[SCHEMES[recipe.scheme].linear]


def dtype_of(scheme: Scheme) -> torch.dtype:
    """The dtype of a scheme's codes."""
    dtype: torch.dtype = getattr(torch, scheme.codes)
    return dtype


def quantized(linear: nn.Linear, recipe: Quantize, name: str = "") -> QuantizedLinear:
    """Quantise a linear under a recipe's `[quantize]`; the original is not changed.

    Args:
        linear: The original.
        recipe: The recipe's section.
        name: The linear's name, the key of its largest input in a recipe with static scales.
    """
    scheme, granularity = SCHEMES[recipe.scheme], recipe.granularity
    amax = None if recipe.amax is None else recipe.amax[name]
    given = linear, granularity, dtype_of(scheme), amax
    if recipe.emulate:
        return EmulatedLinear.from_linear(*given, scheme.activations)
    return linear_class(recipe).from_linear(*given)


def fp8_product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply FP8 codes with `torch._scaled_mm`.

    Args:
        codes: Codes of the activations, M × K.
        scale: Scales of the activations, M × 1, or 0-dim if `weight_scale` is.
        weight: Codes of the weight, N × K.
        weight_scale: N × 1, or 0-dim.
        bias: N values of any dtype, or None.
        out: The tensor to write to, M × N of `dtype`, contiguous; None allocates one.
        dtype: The result's dtype.

    Returns:
        M × N of `dtype`.
    """
    if codes.device.type == "cpu" and not scale.ndim:
        # With one scale per tensor torch's product is hundreds of times slower on a CPU.
        scale, weight_scale = scale.repeat(len(codes), 1), weight_scale.repeat(len(weight), 1)
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale.t(),
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
        out=out,
    )


def _codes(x: Tensor, granularity: Granularity, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return quantize_rows(x, dtype) if granularity == "row" else quantize_tensor(x, dtype)
