"""One row of all modulations: the same values as the linears give one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.families.flux1 import FLUX1
from hasten.step.modulations import Modulations, RowReaders


@pytest.fixture
def norms(pipe: Any) -> list[tuple[str, Any]]:
    return FLUX1.modulated_norms(pipe.transformer)


@torch.no_grad()
def test_rows_are_what_the_linears_give(norms: list[tuple[str, Any]]) -> None:
    modulations = Modulations(norms)
    conditioning = torch.randn(5, 32)
    rows = modulations.rows(conditioning)
    assert rows.shape == (5, modulations.width)
    assert modulations.width == sum(norm.linear.out_features for _, norm in norms)
    for name, norm in norms:
        start = modulations.start[name]
        expected = norm.linear(nn.functional.silu(conditioning))
        torch.testing.assert_close(rows[:, start : start + expected.shape[1]], expected)


def test_every_modulated_norm_is_there_in_order(pipe: Any, norms: list[tuple[str, Any]]) -> None:
    linears = {name for name, _ in pipe.transformer.named_modules() if name.endswith(".linear")}
    assert {f"{name}.linear" for name, _ in norms} == linears
    starts = list(Modulations(norms).start.values())
    assert starts == sorted(starts)
    assert starts[0] == 0


@torch.no_grad()
def test_an_adapters_layer_is_called(norms: list[tuple[str, Any]]) -> None:
    class Adapter(nn.Module):
        out_features = 64

        def forward(self, active: torch.Tensor) -> torch.Tensor:
            return active.repeat(1, 2) + 1

    norms[-1][1].linear = Adapter()
    modulations = Modulations(norms)
    conditioning = torch.randn(2, 32)
    rows = modulations.rows(conditioning)[:, modulations.start["norm_out"] :]
    assert torch.equal(rows, nn.functional.silu(conditioning).repeat(1, 2) + 1)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)


@torch.no_grad()
def test_readers_give_their_slices_while_a_row_is_bound() -> None:
    norms = Norm(3), Norm(2)
    readers = RowReaders(Modulations([("a", norms[0]), ("b", norms[1])]))
    row, activation = torch.randn(2, 5), torch.randn(2, 4)
    plain = [nn.functional.linear(activation, n.linear.weight, n.linear.bias) for n in norms]
    with readers.reading(row):
        assert torch.equal(norms[0].linear(activation), row[:, :3])
        assert torch.equal(norms[1].linear(activation), row[:, 3:])
    assert all(torch.equal(n.linear(activation), y) for n, y in zip(norms, plain, strict=True))
    readers.detach()
    assert all("forward" not in norm.linear.__dict__ for norm in norms)


def test_readers_leave_the_names_of_modules_and_weights(pipe: Any) -> None:
    modules, weights = dict(pipe.transformer.named_modules()), pipe.transformer.state_dict()
    RowReaders(Modulations(FLUX1.modulated_norms(pipe.transformer)))
    assert dict(pipe.transformer.named_modules()) == modules
    assert pipe.transformer.state_dict().keys() == weights.keys()


@torch.no_grad()
def test_readers_follow_a_linear_that_was_wrapped_since() -> None:
    class Adapter(nn.Module):
        """As PEFT's: the linear inside, and something added."""

        out_features = 3

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, activation: torch.Tensor) -> torch.Tensor:
            added: torch.Tensor = self.base_layer(activation) + 1
            return added

    norm = Norm(3)
    readers = RowReaders(Modulations([("norm", norm)]))
    base = norm.linear
    norm.linear = Adapter(base)  # type: ignore[assignment]
    readers.attach()
    row, activation = torch.randn(2, 3), torch.randn(2, 4)
    with readers.reading(row):
        assert torch.equal(norm.linear(activation), row)
    assert torch.equal(norm.linear(activation), base(activation) + 1)


def test_an_exception_unbinds_the_row() -> None:
    readers = RowReaders(Modulations([("norm", Norm(3))]))
    with pytest.raises(KeyboardInterrupt), readers.reading(torch.zeros(1, 3)):
        raise KeyboardInterrupt
    assert readers.readers[0].row is None
