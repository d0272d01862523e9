"""The error of each quantised linear on the activations of a real run.

The measure is the signal-to-quantisation-noise ratio of the output,

    SQNR = 10 · log10(‖y‖² / ‖y − ŷ‖²) dB,

where y is the output of the original and ŷ that of the quantised linear for the same input. 20 dB
is a relative error of 0.1, 40 dB of 0.01. Each linear is measured alone; the propagation of errors
through later layers is not included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from hasten.quantization.linear import quantized
from hasten.quantization.plan import Linears
from hasten.recipe import Quantize

OUTLIER_DB = 6.0  # dB below the median: a layer with twice the median error


@dataclass(frozen=True)
class LayerError:
    """The error of one linear.

    Attributes:
        name: The linear's name.
        inputs: Its number of input features.
        outputs: Its number of output features.
        sqnr_db: In dB; infinite without any difference, minus infinity for non-finite values.
        calls: The number of measured calls.
    """

    name: str
    inputs: int
    outputs: int
    sqnr_db: float
    calls: int


def layer_errors(
    linears: Linears, recipe: Quantize, run: Callable[[], object], *, calls: int = 8
) -> list[LayerError]:
    """Measure the errors of linears under a recipe; the model is not changed.

    Only one layer at a time is quantised, during its call.

    Args:
        linears: Names and linears to measure.
        recipe: The `[quantize]` section.
        run: Calls the plain, uncompiled pipeline.
        calls: The number of calls to measure per linear.

    Returns:
        One error per linear that ran, the largest error first.
    """
    sums = {name: Sums() for name, _ in linears}
    with watched(linears, lambda name: partial(_measure, sums[name], recipe, name, calls)):
        run()
    errors = [
        LayerError(name, linear.in_features, linear.out_features, sums[name].sqnr(), count)
        for name, linear in linears
        if (count := sums[name].calls)
    ]
    return sorted(errors, key=lambda error: error.sqnr_db)


def worth_skipping(errors: Sequence[LayerError]) -> list[str]:
    """Names of the linears with at least twice the median error, the largest error first."""
    measured = [error.sqnr_db for error in errors if math.isfinite(error.sqnr_db)]
    if not measured:
        return []
    floor = median(measured) - OUTLIER_DB
    return [error.name for error in errors if error.sqnr_db <= floor]


@dataclass
class Sums:
    """Energies of signal and error so far, as 0-dim tensors, so no value is read back."""

    signal: Tensor = field(default_factory=lambda: torch.zeros(()))
    noise: Tensor = field(default_factory=lambda: torch.zeros(()))
    calls: int = 0

    def sqnr(self) -> float:
        signal, noise = self.signal.item(), self.noise.item()
        if noise == 0:
            return math.inf
        finite = 0 < signal < math.inf and noise < math.inf
        return 10 * math.log10(signal / noise) if finite else -math.inf


@torch.no_grad()
def _measure(
    sums: Sums,
    recipe: Quantize,
    name: str,
    calls: int,
    linear: nn.Linear,
    args: tuple[Any, ...],
    y: Tensor,
) -> None:
    """Forward hook: compare with the output of the quantised linear."""
    if sums.calls >= calls:
        return
    exact = y.to(torch.float32)
    error = quantized(linear, recipe, name)(*args).to(torch.float32) - exact
    sums.signal = exact.square().sum() + sums.signal.to(y.device)
    sums.noise = error.square().sum() + sums.noise.to(y.device)
    sums.calls += 1


@contextmanager
def watched(
    modules: Sequence[tuple[str, nn.Module]], hook_for: Callable[[str], Callable[..., Any]]
) -> Iterator[None]:
    """Inside the context, each module has the forward hook `hook_for(name)`."""
    with ExitStack() as hooks:
        for name, module in modules:
            hooks.callback(module.register_forward_hook(hook_for(name)).remove)
        yield
