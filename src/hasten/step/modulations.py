"""The adaLN modulations of a transformer, side by side in one row.

Every modulated norm passes one conditioning vector (timestep, guidance, pooled text) through a
linear of its own (adaLN-Zero, Peebles & Xie 2023). None of them sees the picture, so the rows of
all steps can be made before the first one.
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
    """The linears of the modulated norms in the order in which they run, and where each writes.

    Attributes:
        start: The column at which each norm's values begin, by the norm's name.
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
        """R×D conditioning -> R×width: each linear once, for all R rows in one product.

        Weights in host memory are brought over one linear at a time.
        """
        active = nn.functional.silu(conditioning)
        table = active.new_empty(len(active), self.width)
        for name, norm in self.norms:
            values = _on(active, _linear(norm))
            table[:, self.start[name] :][:, : values.shape[1]] = values
        return table


class RowReader:
    """In the place of a modulation linear's forward: gives its slice of the bound row.

    Without a bound row it is the forward that was there. The linear stays where it is in the module
    tree, under its own name.
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
        """B×D -> B×out_features."""
        if self.row is None:
            return self.forward(activation)
        return self.row[:, self.start : self.stop]

    def detach(self) -> None:
        """Give the linear its forward back, unless something else has taken its place since."""
        if getattr(self.linear.__dict__.get("forward"), "__self__", None) is not self:
            return
        if self.own:
            self.linear.forward = self.forward
        else:
            del self.linear.forward


class RowReaders:
    """A reader for each modulation linear of a transformer."""

    def __init__(self, modulations: Modulations) -> None:
        self.modulations = modulations
        self.readers: list[RowReader] = []
        self.attach()

    def attach(self) -> None:
        """Follow linears that were replaced since, as adapters do."""
        linears = [_linear(norm) for _, norm in self.modulations.norms]
        if [id(reader.linear) for reader in self.readers] == [id(linear) for linear in linears]:
            return
        self.detach()
        starts = self.modulations.start.values()
        self.readers = [
            RowReader(linear, start) for linear, start in zip(linears, starts, strict=True)
        ]

    def detach(self) -> None:
        """Give all linears their forwards back."""
        for reader in self.readers:
            reader.detach()
        self.readers = []

    @contextmanager
    def reading(self, row: Tensor) -> Iterator[None]:
        """Bind a row (B×width) while it lasts."""
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
    """The linear on these rows, wherever its weights are."""
    if isinstance(linear, nn.Linear) and linear.weight.device != active.device:
        weight = linear.weight.to(active.device, non_blocking=True)
        bias = None if linear.bias is None else linear.bias.to(active.device, non_blocking=True)
        return nn.functional.linear(active, weight, bias)
    values: Tensor = linear(active)
    return values
