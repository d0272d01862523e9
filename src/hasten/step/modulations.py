"""The adaLN modulations of a transformer, concatenated into one row per step.

Every modulated norm passes one conditioning vector (timestep, guidance, pooled text) through its
own linear (adaLN-Zero, Peebles & Xie 2023). The vector does not depend on the image, so the rows of
all steps can be computed before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hasten.step.protocols import Component

Norms = Sequence[tuple[str, nn.Module]]
"""Modulated norms by name, in the order in which they run, each with a `linear`."""


class Modulations:
    """The linears of the modulated norms, in execution order, and their columns in a row.

    Attributes:
        norms: The modulated norms by name.
        start: The first column of each norm's values, by the norm's name.
        width: Length of a row.
    """

    def __init__(self, norms: Norms) -> None:
        self.norms = list(norms)
        self.start: dict[str, int] = {}
        self.width = 0
        for name, norm in self.norms:
            self.start[name] = self.width
            self.width += _linear(norm).out_features

    def rows(self, conditioning: Tensor) -> Tensor:
        """Compute R rows: each linear runs once, as one product for all of them.

        Weights in host memory are copied to the device one linear at a time.

        Args:
            conditioning: R×D, before the activation function.

        Returns:
            R×width.
        """
        active = nn.functional.silu(conditioning)
        table = active.new_empty(len(active), self.width)
        for name, norm in self.norms:
            values = _on(active, _linear(norm))
            table[:, self.start[name] :][:, : values.shape[1]] = values
        return table


class RowReader:
    """Replaces a modulation linear's forward: returns its slice of the bound row.

    Without a bound row, it calls the original forward. The linear keeps its place and name in the
    module tree.
    """

    def __init__(self, linear: Component, start: int) -> None:
        self.linear = linear
        self.stop = start + linear.out_features
        self.start = start
        self.row: Tensor | None = None
        self.own = "forward" in linear.__dict__
        self.forward: Callable[[Tensor], Tensor] = linear.forward
        linear.forward = self.read

    def read(self, activation: Tensor) -> Tensor:
        """The linear's output: B×D -> B×out_features."""
        if self.row is None:
            return self.forward(activation)
        return self.row[:, self.start : self.stop]

    def detach(self) -> None:
        """Restore the linear's forward, unless it has been replaced again."""
        if getattr(self.linear.__dict__.get("forward"), "__self__", None) is not self:
            return
        if self.own:
            self.linear.forward = self.forward
        else:
            del self.linear.forward


class RowReaders:
    """One reader per modulation linear of a transformer."""

    def __init__(self, modulations: Modulations) -> None:
        self.modulations = modulations
        self.readers: list[RowReader] = []
        self.attach()

    def attach(self) -> None:
        """Attach to the current linears; adapters may have replaced them."""
        linears = [_linear(norm) for _, norm in self.modulations.norms]
        if [id(reader.linear) for reader in self.readers] == [id(linear) for linear in linears]:
            return
        self.detach()
        starts = self.modulations.start.values()
        self.readers = [
            RowReader(linear, start) for linear, start in zip(linears, starts, strict=True)
        ]

    def detach(self) -> None:
        """Restore the forwards of all linears."""
        for reader in self.readers:
            reader.detach()
        self.readers = []

    @contextmanager
    def reading(self, row: Tensor) -> Iterator[None]:
        """Bind a row (B×width) inside the context."""
        for reader in self.readers:
            reader.row = row
        try:
            yield
        finally:
            for reader in self.readers:
                reader.row = None


def _linear(norm: nn.Module) -> Any:
    return norm.linear


def _on(active: Tensor, linear: Component) -> Tensor:
    """Apply the linear to these rows, also if its weights are on another device."""
    if isinstance(linear, nn.Linear) and linear.weight.device != active.device:
        weight = linear.weight.to(active.device, non_blocking=True)
        bias = None if linear.bias is None else linear.bias.to(active.device, non_blocking=True)
        return nn.functional.linear(active, weight, bias)
    values: Tensor = linear(active)
    return values
