"""The adaLN modulations of a transformer, side by side in one row.

Every modulated norm of a FLUX block passes one conditioning vector (timestep, guidance, pooled
text) through a linear of its own (adaLN-Zero, Peebles & Xie 2023). None of them sees the picture,
so the rows of all steps can be made before the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Modulations", "RowReader"]


class Modulations:
    """The linears of the modulated norms in the order in which they run, and where each writes.

    norms: (name, norm) pairs, each norm with a `linear`. `start[name]` is the column where that
    norm's values begin; `width` is the length of a row.
    """

    def __init__(self, norms: Sequence[tuple[str, nn.Module]]) -> None:
        self.norms = list(norms)
        self.start: dict[str, int] = {}
        self.width = 0
        for name, norm in self.norms:
            self.start[name] = self.width
            self.width += _linear(norm).out_features

    def rows(self, conditioning: Tensor) -> Tensor:
        """R×D conditioning -> R×width: each linear once, for all R rows in one product.

        Weights that wait in host memory are brought over one linear at a time.
        """
        active = nn.functional.silu(conditioning)
        table = active.new_empty(len(active), self.width)
        for name, norm in self.norms:
            linear = _linear(norm)
            values = _on(active, linear)
            table[:, self.start[name] :][:, : values.shape[1]] = values
        return table

    @property
    def device(self) -> torch.device:
        """Where the weights wait."""
        device: torch.device = next(_linear(self.norms[0][1]).parameters()).device
        return device


class RowReader(nn.Module):
    """Stands in for a modulation linear: gives its slice of the row that is bound, computes
    nothing. Without a bound row it is the linear."""

    def __init__(self, linear: Any, start: int) -> None:
        super().__init__()
        self.linear = linear
        self.start = start
        self.out_features: int = linear.out_features
        self.row: Tensor | None = None

    def forward(self, activation: Tensor) -> Tensor:
        """B×D -> B×out_features."""
        if self.row is None:
            values: Tensor = self.linear(activation)
            return values
        return self.row

    @staticmethod
    @contextmanager
    def reading(readers: Sequence[RowReader], row: Tensor) -> Iterator[None]:
        """Bind a row (B×width) while it lasts."""
        for reader in readers:
            reader.row = row[:, reader.start : reader.start + reader.out_features]
        try:
            yield
        finally:
            for reader in readers:
                reader.row = None


def _linear(norm: Any) -> Any:
    linear = norm.linear
    return linear.linear if isinstance(linear, RowReader) else linear


def _on(active: Tensor, linear: Any) -> Tensor:
    """The linear on these rows, wherever its weights are."""
    if type(linear) is nn.Linear:
        weight = linear.weight.to(active.device, non_blocking=True)
        bias = None if linear.bias is None else linear.bias.to(active.device, non_blocking=True)
        return nn.functional.linear(active, weight, bias)
    values: Tensor = linear(active)  # an adapter's layer: it knows what to do with its parts
    return values
