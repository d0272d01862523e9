"""Modulation weights in host memory: they leave this pipeline's device, and no other's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from hasten import Recipe, UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.passes.offload import offload_modulations
from hasten.step.modulations import Modulations, RowReaders

CPU = torch.device("cpu")


def norms(pipe: Any) -> list[tuple[str, Any]]:
    return FLUX1.modulated_norms(pipe.transformer)


def test_parameters_are_replaced_and_equal(pipe: Any) -> None:
    before = [norm.linear.weight for _, norm in norms(pipe)]
    values = [weight.clone() for weight in before]
    done = offload_modulations(norms(pipe), CPU)
    for (_, norm), old, value in zip(norms(pipe), before, values, strict=True):
        assert norm.linear.weight is not old, "a pipeline that shares it would lose it as well"
        assert torch.equal(norm.linear.weight, value)
        assert isinstance(norm.linear.weight, torch.nn.Parameter)
    moved = sum(p.nbytes for _, norm in norms(pipe) for p in norm.linear.parameters())
    assert f"{len(before)} modulation linears, {moved / 2**20:.1f} MiB" in done.description
    assert done.undo is not None
    done.undo()
    assert all(norm.linear.weight.device == CPU for _, norm in norms(pipe))


def test_linears_with_readers_of_the_table_are_moved(pipe: Any) -> None:
    linear = pipe.transformer.norm_out.linear
    RowReaders(Modulations(norms(pipe)))
    old = linear.weight
    offload_modulations(norms(pipe), CPU)
    assert linear.weight is not old


def test_layers_with_adapters_are_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.check import check
    from tests.test_check import Capable

    class LoraLinear(torch.nn.Linear):
        """What an adapter puts in a linear's place has another type."""

    pipe.transformer.norm_out.linear = LoraLinear(4, 4)
    monkeypatch.setattr("hasten.check.conflicts", lambda recipe, device: [])
    recipe = Recipe.from_dict({"fuse": {}, "offload": {"kind": "modulation"}})
    with pytest.raises(UnsupportedError, match="LoraLinear") as caught:
        check(recipe, pipe, FLUX1, Capable())  # type: ignore[arg-type]
    assert "fuse_lora" in caught.value.fix


def test_a_cpu_has_nothing_to_offload_from(pipe: Any) -> None:
    recipe = Recipe.from_dict({"fuse": {}, "offload": {"kind": "modulation"}})
    with pytest.raises(UnsupportedError, match="this is the CPU"):
        hasten.optimize(pipe, recipe)
