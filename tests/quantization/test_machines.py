"""Which machine can run which scheme; each problem names a recipe that works there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hasten.check import problems
from hasten.errors import UnsupportedError
from hasten.machine import Gpu, Machine, machine
from hasten.recipe import Quantize, Recipe
from tests.test_machine import CPU_ONLY, H100, L4, P100, SERVER, T4, with_gpu

A100 = Gpu(0, "NVIDIA A100", (8, 0), 80 * 2**30)
ADA = dataclasses.replace(L4, index=0)
CPU_WITH_FP8 = dataclasses.replace(CPU_ONLY, fp8_on_cpu=True)


@pytest.mark.parametrize(
    ("here", "device", "quantize", "nearest"),
    [
        (SERVER, "cuda", {}, None),
        (with_gpu(ADA), "cuda", {}, None),
        (with_gpu(A100), "cuda", {}, {"scheme": "int8"}),
        (with_gpu(A100), "cuda", {"emulate": True}, None),
        (with_gpu(A100), "cuda", {"scheme": "fp8-weight"}, None),
        (with_gpu(T4), "cuda", {}, {"scheme": "int8"}),
        (with_gpu(T4), "cuda", {"scheme": "int8"}, None),
        (with_gpu(P100), "cuda", {}, {"scheme": "int8-weight"}),
        (with_gpu(P100), "cuda", {"scheme": "int8"}, {"scheme": "int8-weight"}),
        (CPU_WITH_FP8, "cpu", {}, None),
        (CPU_ONLY, "cpu", {}, {"emulate": True}),
        (CPU_ONLY, "cpu", {"scheme": "int8"}, None),
        (CPU_ONLY, "cpu", {"scheme": "fp8-weight"}, None),
    ],
    ids=str,
)
def test_the_fix_works(
    here: Machine, device: str, quantize: dict[str, Any], nearest: dict[str, Any] | None
) -> None:
    found = problems(Recipe.from_dict({"quantize": quantize}), here, device)
    if nearest is None:
        assert found == []
        return
    (problem,) = found
    ((key, value),) = nearest.items()
    assert f"{key} = {'true' if value is True else repr(value)}".replace("'", '"') in problem.fix
    assert problems(Recipe.from_dict({"quantize": {**quantize, **nearest}}), here, device) == []


@pytest.mark.parametrize("quantize", [{"scheme": "fp8-weight"}, {"emulate": True}], ids=str)
def test_triton_has_no_fp8_before_ada(quantize: dict[str, Any]) -> None:
    recipe = Recipe.from_dict({"quantize": quantize, "compile": {}})
    (problem,) = problems(recipe, with_gpu(A100), "cuda")
    assert "compute capability 8.9, it has 8.0" in problem.fault
    assert "int8" in problem.fix
    assert problems(recipe.but(compile=None), with_gpu(A100), "cuda") == []
    assert problems(recipe, with_gpu(H100), "cuda") == []
    graphs = Recipe.from_dict(
        {"quantize": quantize, "compile": {"mode": "none", "cuda_graphs": "on"}}
    )
    assert not any("FP8" in found.fault for found in problems(graphs, with_gpu(A100), "cuda"))


def test_apple_gpus_are_not_promised() -> None:
    problem = dataclasses.replace(CPU_ONLY, mps=True).quantize_problem("mps", "fp8", emulate=True)
    assert problem is not None
    assert "mps" in problem.fault


def test_the_cpu_here_was_tried() -> None:
    import torch

    from hasten.quantization.linear import Fp8Linear

    assert machine().quantize_problem("cpu", "int8") is None
    if not machine().fp8_on_cpu:
        pytest.skip("torch multiplies no FP8 on this CPU")
    Fp8Linear.from_linear(torch.nn.Linear(32, 32).requires_grad_(False))(torch.randn(3, 32))


def test_a_torch_without_the_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def missing(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Could not run 'aten::_scaled_mm' with the CPU backend")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    assert machine.__wrapped__().fp8_on_cpu is False


def test_optimise_asks(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import hasten

    monkeypatch.setattr("hasten.apply.machine", lambda: CPU_ONLY)
    before = dict(pipe.transformer.named_modules())
    with pytest.raises(UnsupportedError, match="no FP8 product on this CPU"):
        hasten.optimize(pipe, Recipe(quantize=Quantize()))
    assert dict(pipe.transformer.named_modules()) == before
