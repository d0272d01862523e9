"""Linears that read the same rows, merged into one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hasten.kernels.int8_product import int8_product
from hasten.kernels.quantize import FP8
from hasten.kernels.streams import Streams
from hasten.quantization.linear import Fp8Linear, Int8Linear, fp8_product
from hasten.quantization.plan import special_weight
from hasten.quantization.schemes import why_no_row_scales

CODES: Mapping[type, torch.dtype] = MappingProxyType({Fp8Linear: FP8, Int8Linear: torch.int8})
"""Linears that take codes and row scales, and of which dtype the codes are."""


class Projection:
    """One weight of the linears' outputs, one below the other.

    The linears' own weights become views of it, so no memory is added and the modules still work.
    `codes`: the dtype of the codes that it takes with their row scales, None where it takes values
    (from nn.Linear).
    """

    def __init__(self, linears: Sequence[Any]) -> None:
        self.linears = tuple(linears)
        self.codes = CODES.get(type(linears[0]))
        weights = [linear.weight.detach() for linear in linears]
        joined = _joined(weights)  # by an earlier pipeline over the same weights
        self.weight = torch.cat(weights) if joined is None else joined
        if joined is None:
            parts = torch.split(self.weight, [len(weight) for weight in weights])
            for linear, part in zip(linears, parts, strict=True):
                linear.weight.data = part
        self.bias = _bias(linears)
        self.scale: Tensor | None = None
        if self.codes is not None:
            self.scale = torch.cat([linear.weight_scale for linear in linears])
        self.seen = [_state(linear) for linear in linears]

    def __call__(self, values: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
        """R×K -> R×N in the bias's dtype, into `out` where given.

        values: codes with their row `scales` (R×1) where it takes them, else plain values.
        """
        if self.scale is None:
            if self.bias is None:
                return torch.mm(values, self.weight.t(), out=out)
            return torch.addmm(self.bias, values, self.weight.t(), out=out)
        if self.codes == torch.int8:
            if out is None:
                out = values.new_empty(len(values), len(self.weight), dtype=self.dtype)
            int8_product(values, scales, self.weight, self.scale, self.bias, out)
            return out
        return fp8_product(values, scales, self.weight, self.scale, self.bias, out)

    @property
    def dtype(self) -> torch.dtype:
        """What comes out where codes go in: FP8 products give bfloat16 and nothing else."""
        if self.codes == FP8 or self.bias is None:
            return torch.bfloat16
        return self.bias.dtype

    def changed(self) -> str | None:
        """Says so if a linear's weight or bias has been replaced since it was merged."""
        for linear, seen in zip(self.linears, self.seen, strict=True):
            if _state(linear) != seen:
                rows, columns = linear.weight.shape
                return f"weight or bias of a {rows}×{columns} {type(linear).__name__}"
        return None


def project(
    pair: tuple[Projection, Projection], rows: tuple[Tensor, Tensor], streams: Streams
) -> Tensor:
    """Text rows through the first projection, image rows through the second: R×N.

    rows: values or codes, R×K, and the codes' scales, R×1.
    """
    text, image = pair
    values, scales = rows
    cut = streams.text_rows
    dtype = text.dtype if text.codes else values.dtype
    out = torch.empty(len(values), len(text.weight), dtype=dtype, device=values.device)
    for projection, part in ((text, slice(None, cut)), (image, slice(cut, None))):
        if len(out[part]):
            projection(values[part], scales[part] if projection.codes else scales, out=out[part])
    return out


def same_kind(
    linears: Sequence[Any],
    dtype: torch.dtype,
    to_be: Mapping[nn.Module, type] = MappingProxyType({}),
) -> list[str]:
    """Why these linears cannot be merged, or fed by one kernel; empty where they can.

    to_be: what will stand in for some of them by then, with one scale per row, found each time.
    """
    kinds = {to_be.get(linear, type(linear)) for linear in linears}
    names = " and ".join(sorted(kind.__name__ for kind in kinds))
    if any(hasattr(linear, "base_layer") for linear in linears):
        return [
            "LoRA adapters are not fused: call pipe.fuse_lora() and pipe.unload_lora_weights() "
            "before optimising"
        ]
    if len(kinds) > 1:
        return [
            f"linears that read one input are of different kinds, {names}: quantize.skip must "
            "match all of them, or the whole block"
        ]
    if kinds == {nn.Linear}:
        special = [why for linear in linears if (why := special_weight(linear.weight))]
        plain = "load the model unquantised, and quantise with [quantize]"
        return [f"a weight of its linears is {special[0]}: {plain}"] if special else []
    if not kinds <= CODES.keys():
        known = ", ".join(kind.__name__ for kind in (nn.Linear, *CODES))
        return [f"its linears are {names}: there are kernels for {known}"]
    if kinds == {Fp8Linear} and dtype != torch.bfloat16:
        return ["FP8 kernels need bfloat16: pass --dtype bfloat16"]
    made = [linear for linear in linears if linear not in to_be]
    return _foreign_scales(made)


def _foreign_scales(linears: Sequence[Any]) -> list[str]:
    """Why codes with a scale for each row cannot feed these quantised linears; empty where not."""
    for linear in linears:
        activations = "dynamic" if linear.input_scale is None else "static"
        if why := why_no_row_scales(linear.granularity, activations):
            return [why]
    return []


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """The tensor that these N×K weights are consecutive rows of; None where there is none."""
    first = weights[0]
    for one, other in pairwise(weights):
        adjacent = one.data_ptr() + one.nbytes == other.data_ptr()
        if not adjacent or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
            return None
    if not all(weight.is_contiguous() for weight in weights):
        return None
    rows = sum(len(weight) for weight in weights)
    return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())


def _state(linear: Any) -> tuple[int, int, int]:
    """Where the weight and the bias are, and how often the bias, which is copied, was written."""
    bias = linear.bias
    return (
        linear.weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None or bias.is_inference() else bias._version,
    )


def _bias(linears: Sequence[Any]) -> Tensor | None:
    """The biases one after the other, zeros where one is missing; None where all are."""
    given = [linear.bias.detach() for linear in linears if linear.bias is not None]
    if not given:
        return None
    return torch.cat(
        [
            given[0].new_zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach()
            for linear in linears
        ]
    )
