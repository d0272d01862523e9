"""What stands in for `nn.Linear` once its weight is eight-bit codes.

    y = x Wᵀ + b        W ≈ weight · weight_scale        x ≈ codes · scale, made anew at each call

| class            | weight codes | activations | product |
| ---------------- | ------------ | ----------- | ------- |
| Fp8Linear        | FP8          | FP8         | FP8, accumulated in float32 (`torch._scaled_mm`) |
| Int8Linear       | int8         | int8        | int8, accumulated in int32 (`int8_product`) |
| WeightOnlyLinear | FP8 or int8  | as they are | in the activations' dtype |
| EmulatedLinear   | any of these, rounded alike | | in the activations' dtype, on any device |

Shapes: M rows (every token of every item), K inputs, N outputs. `weight` is N × K; `weight_scale`
N × 1 (granularity "row": one scale an output channel, and one a token) or 0-dim ("tensor"), in
float32. Both are buffers: a model's `dtype` is that of its parameters.

FP8 activations may have a calibrated scale instead, `input_scale` (0-dim, float32, a buffer): one
for every token of every call, so nothing is searched for. What lies beyond 448 · input_scale,
infinity too, becomes ±448; what is not a number stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from hasten.kernels.int8_product import int8_product
from hasten.kernels.quantize import (
    FP8,
    LIMITS,
    TINY,
    dequantize,
    quantize_rows,
    quantize_tensor,
)
from hasten.quantization.schemes import SCHEMES, Scheme
from hasten.recipe import Quantize

__all__ = [
    "EmulatedLinear",
    "Fp8Linear",
    "Int8Linear",
    "QuantizedLinear",
    "WeightOnlyLinear",
    "dtype_of",
    "linear_class",
    "quantized",
]

Granularity = Literal["row", "tensor"]


class QuantizedLinear(nn.Module):
    """What the four have in common. `in_features` and `out_features` are those of the original."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    bias: nn.Parameter | None
    keeps_dtype: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "input_scale")

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
        """Codes and scales move with the model, and keep their dtype under `.to(dtype)`."""

        def apply(tensor: Tensor) -> Tensor:
            if not any(tensor is self._buffers[name] for name in self.keeps_dtype):
                return fn(tensor)
            whole = torch.int8 if tensor.dtype.itemsize == 1 else torch.int32
            return fn(tensor.view(whole)).view(tensor.dtype)  # integers are only moved

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self


class Fp8Linear(QuantizedLinear):
    """Weight and activations in float8_e4m3fn. Needs `Machine.quantize_problem` to find none."""

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, granularity: Granularity = "row", amax: float | None = None
    ) -> Self:
        """`amax`: the largest absolute input, for a calibrated scale; None finds it each time."""
        codes, scale = _codes(linear.weight.detach(), granularity, FP8)
        return cls(codes, scale, linear.bias, _input_scale(amax, scale))

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        if self.input_scale is None:
            codes, scale = _codes(x, self.granularity, FP8)
        else:
            codes, scale = _codes_by(x, self.input_scale), self.input_scale
            if self.granularity == "row":  # the product takes scales a row on both sides or none
                scale = scale.repeat(len(codes), 1)
        # On CUDA, products with a scale a row come out in bfloat16 and in nothing else.
        dtype = torch.bfloat16 if x.is_cuda else x.dtype
        y = self.product(codes, scale, dtype=dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def product(
        self,
        codes: Tensor,
        scale: Tensor,
        out: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Codes M × K and their scales (M × 1, or one value, as the weight's) -> M × N of `dtype`.

        `out` (M × N of `dtype`, contiguous) is written to where it is given.
        """
        weight_scale = self.weight_scale
        if codes.device.type == "cpu" and not scale.ndim:
            # With one scale per tensor torch's product is hundreds of times slower on a CPU.
            scale = scale.repeat(len(codes), 1)
            weight_scale = weight_scale.repeat(self.out_features, 1)
        return torch._scaled_mm(
            codes,
            self.weight.t(),
            scale_a=scale,
            scale_b=weight_scale.t(),
            bias=None if self.bias is None else self.bias.to(dtype),
            out_dtype=dtype,
            use_fast_accum=True,
            out=out,
        )


class Int8Linear(QuantizedLinear):
    """Weight and activations in int8; the product is exact, so only the codes are rounded."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, granularity: Granularity = "row") -> Self:
        return cls(*_codes(linear.weight.detach(), granularity, torch.int8), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        codes, scale = _codes(x, self.granularity, torch.int8)
        y = self.product(codes, scale, dtype=x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def product(self, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Codes M × K and their scales (M × 1, or one value) -> M × N of `dtype`."""
        y = torch.empty(len(codes), self.out_features, dtype=dtype, device=codes.device)
        int8_product(codes, scale, self.weight, self.weight_scale, self.bias, y)
        return y


class WeightOnlyLinear(QuantizedLinear):
    """The weight as codes of either dtype, made whole at each call: half the memory, not faster."""

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, granularity: Granularity = "row", dtype: torch.dtype = FP8
    ) -> Self:
        return cls(*_codes(linear.weight.detach(), granularity, dtype), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        weight = dequantize(self.weight, self.weight_scale, x.dtype)
        return nn.functional.linear(x, weight, self.bias)


class EmulatedLinear(QuantizedLinear):
    """Rounds as a scheme does and multiplies in the activations' dtype.

    `weight` is N × K in the original dtype, already rounded. `codes` is the scheme's dtype;
    `activations` says whether it rounds activations too.
    """

    keeps_dtype = ("weight_scale", "input_scale")

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: nn.Parameter | None,
        codes: torch.dtype = FP8,
        activations: bool = True,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__(weight, weight_scale, bias, input_scale)
        self.codes = codes
        self.activations = activations

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        granularity: Granularity = "row",
        codes: torch.dtype = FP8,
        activations: bool = True,
        amax: float | None = None,
    ) -> Self:
        """`amax`: as in `Fp8Linear.from_linear`."""
        rounded, scale = _codes(linear.weight.detach(), granularity, codes)
        weight = dequantize(rounded, scale, linear.weight.dtype)
        return cls(weight, scale, linear.bias, codes, activations, _input_scale(amax, scale))

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in x's dtype."""
        if self.input_scale is not None:
            codes = _codes_by(x, self.input_scale)
            x = dequantize(codes, self.input_scale, x.dtype).reshape(x.shape)
        elif self.activations:
            codes, scale = _codes(x, self.granularity, self.codes)
            x = dequantize(codes, scale, x.dtype).reshape(x.shape)
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        what = "weight and activations" if self.activations else "weight"
        return f"{super().extra_repr()}, {what} rounded as {self.codes}"


def linear_class(recipe: Quantize) -> type[QuantizedLinear]:
    """The class of what stands in for linears under a recipe's `[quantize]`."""
    kinds = (Fp8Linear, Int8Linear, WeightOnlyLinear)
    by_name: dict[str, type[QuantizedLinear]] = {kind.__name__: kind for kind in kinds}
    return EmulatedLinear if recipe.emulate else by_name[SCHEMES[recipe.scheme].linear]


def dtype_of(scheme: Scheme) -> torch.dtype:
    """The codes' dtype."""
    dtype: torch.dtype = getattr(torch, scheme.codes)
    return dtype


def quantized(linear: nn.Linear, recipe: Quantize, name: str = "") -> QuantizedLinear:
    """What stands in for this linear under a recipe's `[quantize]`; the linear is not changed.

    name: the linear's, under which a recipe with static scales has its largest input.
    """
    scheme, granularity = SCHEMES[recipe.scheme], recipe.granularity
    codes = dtype_of(scheme)
    amax = None if recipe.amax is None else recipe.amax[name]
    kind = linear_class(recipe)
    if kind is EmulatedLinear:
        return EmulatedLinear.from_linear(linear, granularity, codes, scheme.activations, amax)
    if kind is WeightOnlyLinear:
        return WeightOnlyLinear.from_linear(linear, granularity, codes)
    if kind is Fp8Linear:
        return Fp8Linear.from_linear(linear, granularity, amax)
    return Int8Linear.from_linear(linear, granularity)


def _codes(x: Tensor, granularity: Granularity, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return quantize_rows(x, dtype) if granularity == "row" else quantize_tensor(x, dtype)


def _input_scale(amax: float | None, beside: Tensor) -> Tensor | None:
    """The scale, on the device of `beside`, with which inputs up to `amax` just fit."""
    if amax is None:
        return None
    largest = torch.tensor(amax, dtype=torch.float32, device=beside.device)
    return largest.clamp(min=TINY) / LIMITS[FP8]


def _codes_by(x: Tensor, scale: Tensor) -> Tensor:
    """FP8 codes, M × K, of … × K by a given scale."""
    limit = LIMITS[FP8]
    rows = x.reshape(-1, x.shape[-1])
    return (rows.to(torch.promote_types(x.dtype, scale.dtype)) / scale).clamp(-limit, limit).to(FP8)
