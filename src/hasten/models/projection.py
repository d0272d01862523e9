"""Linears that read the same rows, merged into one product."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hasten.kernels.streams import Streams
from hasten.quantization.linear import Fp8Linear

__all__ = ["Projection", "project", "same_kind"]


class Projection:
    """One weight of the linears' outputs, one below the other.

    The linears' own weights become views of it, so no memory is added and the modules still work.
    `fp8`: whether it takes codes and row scales (from Fp8Linear) or values (from nn.Linear).
    """

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self.linears = tuple(linears)
        self.fp8 = isinstance(linears[0], Fp8Linear)
        first: Any = linears[0]
        if len(linears) == 1:
            self.weight = first.weight.detach()
        else:
            weights = [_weight(linear) for linear in linears]
            joined = _joined(weights)  # by an earlier pipeline over the same weights
            self.weight = torch.cat(weights) if joined is None else joined
            if joined is None:
                self._share()
        self.bias = _bias(self.linears)
        self.scale: Tensor | None = None
        if self.fp8:
            self.scale = torch.cat([_scale(linear) for linear in linears]).t().contiguous()
        self.seen = [_state(linear) for linear in linears]

    def __call__(self, values: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
        """R×K -> R×N in the bias's dtype, into `out` where given.

        values: codes with their row `scales` (R×1) if `fp8`, else plain values (scales unread).
        """
        if self.scale is None:
            if self.bias is None:
                return torch.mm(values, self.weight.t(), out=out)
            return torch.addmm(self.bias, values, self.weight.t(), out=out)
        return torch._scaled_mm(
            values, self.weight.t(), scale_a=scales, scale_b=self.scale, bias=self.bias,
            out_dtype=torch.bfloat16, use_fast_accum=True, out=out,
        )  # fmt: skip

    def changed(self) -> str | None:
        """Says so if a linear's weight or bias has been replaced since it was merged."""
        for linear, seen in zip(self.linears, self.seen, strict=True):
            if _state(linear) != seen:
                rows, columns = _weight(linear).shape
                return f"weight or bias of a {rows}×{columns} {type(linear).__name__}"
        return None

    def _share(self) -> None:
        start = 0
        for linear in self.linears:
            weight = _weight(linear)
            stop = start + len(weight)
            linear.weight.data = self.weight[start:stop]
            start = stop


def project(
    pair: tuple[Projection, Projection], rows: tuple[Tensor, Tensor], streams: Streams
) -> Tensor:
    """Text rows through the first projection, image rows through the second: R×N.

    rows: values or codes, R×K, and the codes' scales, R×1.
    """
    text, image = pair
    values, scales = rows
    cut = streams.text_rows
    dtype = torch.bfloat16 if text.fp8 else values.dtype
    out = torch.empty(len(values), len(text.weight), dtype=dtype, device=values.device)
    for projection, part in ((text, slice(None, cut)), (image, slice(cut, None))):
        if len(out[part]):
            projection(values[part], scales[part] if projection.fp8 else scales, out=out[part])
    return out


def same_kind(
    linears: Sequence[nn.Module], dtype: torch.dtype, to_be_fp8: Container[nn.Module] = ()
) -> list[str]:
    """Why these linears cannot be merged, or fed by one kernel; empty where they can.

    to_be_fp8: those that will be an Fp8Linear of one scale a row, found each time, by then.
    """
    kinds = {Fp8Linear if linear in to_be_fp8 else type(linear) for linear in linears}
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    if len(kinds) > 1:
        return [f"linears that read one input are of different kinds: {names}"]
    if kinds == {Fp8Linear}:
        made = [linear for linear in linears if linear not in to_be_fp8]
        if any(_scale(linear).numel() != len(_weight(linear)) for linear in made):
            return ["its FP8 linears have one scale a tensor, the kernels want one a row"]
        if any(_calibrated(linear) for linear in made):
            return ["its FP8 linears have calibrated scales, the kernels find one for each row"]
        return [] if dtype == torch.bfloat16 else [f"FP8 products give bfloat16, not {dtype}"]
    if kinds == {nn.Linear}:
        return []
    return [f"its linears are {names}: the kernels know nn.Linear and Fp8Linear"]


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
        _weight(linear).data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None or bias.is_inference() else bias._version,
    )


def _weight(linear: Any) -> Tensor:
    weight: Tensor = linear.weight
    return weight.detach()


def _scale(linear: Any) -> Tensor:
    scale: Tensor = linear.weight_scale
    return scale


def _calibrated(linear: Any) -> bool:
    return linear.input_scale is not None


def _bias(linears: Sequence[Any]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [
            torch.zeros(len(linear.weight), dtype=_dtype(linears), device=linear.weight.device)
            if linear.bias is None
            else linear.bias.detach()
            for linear in linears
        ]
    )


def _dtype(linears: Sequence[Any]) -> torch.dtype:
    dtype: torch.dtype = next(linear.bias.dtype for linear in linears if linear.bias is not None)
    return dtype
