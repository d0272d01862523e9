"""The schemes of eight bits in one table: everything else asks it. No torch.

To add one: a line here, its class in `linear.py`, its name in the recipe's `Quantize.scheme`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OLDEST_FP8, OLDEST_INT8 = (8, 9), (7, 5)  # Ada; Turing, as cuBLASLt multiplies int8


@dataclass(frozen=True)
class Scheme:
    """How linears are quantised.

    Attributes:
        name: As recipes write it.
        codes: The codes' dtype, by torch's name.
        label: What the codes are called in summaries.
        limit: The largest code.
        activations: Whether activations are rounded to codes, too.
        multiple_of: Both sides of a weight must be multiples of it: cuBLASLt takes no others. The
            same on every device, so that one recipe means the same layers everywhere.
        oldest_gpu: Compute capability from which on tensor cores multiply the codes; None where
            they are not multiplied as codes.
        fused: Whether the fused kernels write its codes.
        static: Whether it may have calibrated scales for the activations.
        linear: The class in `hasten.quantization.linear` that stands in for `nn.Linear`.
    """

    name: str
    codes: str
    label: str
    limit: float
    activations: bool
    multiple_of: int
    oldest_gpu: tuple[int, int] | None
    fused: bool
    static: bool
    linear: str


FP8: dict[str, Any] = {"codes": "float8_e4m3fn", "label": "FP8", "limit": 448.0}
INT8: dict[str, Any] = {"codes": "int8", "label": "int8", "limit": 127.0}
WEIGHT: dict[str, Any] = {
    "activations": False, "multiple_of": 1, "oldest_gpu": None, "fused": False, "static": False,
    "linear": "WeightOnlyLinear",
}  # fmt: skip

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "fp8", **FP8, activations=True, multiple_of=16, oldest_gpu=OLDEST_FP8, fused=True,
            static=True, linear="Fp8Linear",
        ),
        Scheme(
            "int8", **INT8, activations=True, multiple_of=8, oldest_gpu=OLDEST_INT8, fused=True,
            static=False, linear="Int8Linear",
        ),
        Scheme("fp8-weight", **FP8, **WEIGHT),
        Scheme("int8-weight", **INT8, **WEIGHT),
    )
}  # fmt: skip


def why_no_row_scales(granularity: str, activations: str) -> str | None:
    """Why the kernels have not the scales of such linears; None where they have."""
    if granularity != "row":
        return 'the kernels need one scale per row: set quantize.granularity = "row"'
    if activations != "dynamic":
        return 'the kernels compute the scales of each call: set quantize.activations = "dynamic"'
    return None
