"""One row of all modulations: the same values as the linears give one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.families.flux1.blocks import FluxFamily
from hasten.families.modulations import Modulations, RowReader


@pytest.fixture
def norms(pipe: Any) -> list[tuple[str, Any]]:
    return FluxFamily().modulated_norms(pipe.transformer)


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


@torch.no_grad()
def test_a_reader_gives_its_slice_while_a_row_is_bound() -> None:
    linears = nn.Linear(4, 3), nn.Linear(4, 2)
    readers = [RowReader(linears[0], 0), RowReader(linears[1], 3)]
    row, activation = torch.randn(2, 5), torch.randn(2, 4)
    with RowReader.reading(readers, row):
        assert torch.equal(readers[0](activation), row[:, :3])
        assert torch.equal(readers[1](activation), row[:, 3:])
    for reader, linear in zip(readers, linears, strict=True):
        assert torch.equal(reader(activation), linear(activation))


def test_an_exception_unbinds_the_row() -> None:
    reader = RowReader(nn.Linear(4, 3), 0)
    with pytest.raises(KeyboardInterrupt), RowReader.reading([reader], torch.zeros(1, 3)):
        raise KeyboardInterrupt
    assert reader.row is None
