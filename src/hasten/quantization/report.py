"""How far each quantised linear is from its original, on the activations of a real run.

The measure is the signal-to-quantisation-noise ratio of its output,

    SQNR = 10 · log10(‖y‖² / ‖y − ŷ‖²) dB,

y by the original, ŷ by what would stand in for it on the same input: 20 dB is an error of a tenth,
40 dB of a hundredth. Each linear is judged alone; what its error does further on is not in it.
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

OUTLIER_DB = 6.0  # this far below the median, a layer's error is twice the usual one


@dataclass(frozen=True)
class LayerError:
    """One linear. `calls`: how many were measured.

    `sqnr_db` is infinite where nothing differs, minus infinity where something is not finite.
    """

    name: str
    inputs: int
    outputs: int
    sqnr_db: float
    calls: int


def layer_errors(
    linears: Linears, recipe: Quantize, run: Callable[[], object], *, calls: int = 8
) -> list[LayerError]:
    """Errors of linears under a recipe, the worst first; the model is not changed.

    One layer at a time is quantised, for the length of a call.

    Args:
        linears: Names and linears to measure.
        recipe: How to quantise them.
        run: Calls the plain, uncompiled pipeline.
        calls: How many first calls of each linear count.

    Returns:
        One error per linear that ran.
    """
    sums = {name: Sums() for name, _ in linears}
    with watched(linears, lambda name: partial(_measure, sums[name], recipe, name, calls)):
        run()
    found = [
        LayerError(name, linear.in_features, linear.out_features, sums[name].sqnr(), count)
        for name, linear in linears
        if (count := sums[name].calls)
    ]
    return sorted(found, key=lambda error: error.sqnr_db)


def worth_skipping(errors: Sequence[LayerError]) -> list[str]:
    """Names of the linears whose error stands out: twice the median's or more, worst first."""
    measured = [error.sqnr_db for error in errors if math.isfinite(error.sqnr_db)]
    if not measured:
        return []
    floor = median(measured) - OUTLIER_DB
    return [error.name for error in errors if error.sqnr_db <= floor]


@dataclass
class Sums:
    """Energies of signal and error so far, as 0-dim tensors: nothing is read back meanwhile."""

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
    """A forward hook: what would have come out of the quantised linear?"""
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
    """Inside, each module has the forward hook that `hook_for` makes for its name."""
    with ExitStack() as hooks:
        for name, module in modules:
            hooks.callback(module.register_forward_hook(hook_for(name)).remove)
        yield
