"""Static scales: what is recorded, what is written, and that nothing else is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.calibration.activations import calibrate_activations, largest_inputs
from hasten.errors import AlreadyOptimizedError, InputError, ModelError, UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.models.fingerprint import fingerprint
from hasten.quantization.linear import Fp8Linear
from hasten.recipe import Quantize, Recipe

Call = Callable[..., Tensor]
SHORT = {"steps": 3, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["a red fox", "a kite"]


@pytest.fixture
def linears() -> list[tuple[str, nn.Linear]]:
    torch.manual_seed(0)
    return [(f"layer{index}", nn.Linear(8, 8).requires_grad_(False)) for index in range(3)]


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_the_largest_of_all_calls_is_kept(linears: list[tuple[str, nn.Linear]]) -> None:
    inputs = [torch.randn(2, 5, 8) * size for size in (1, 9, 3)]
    inputs[1][0, 2, 4] = -77.5

    def run() -> None:
        for x in inputs:
            linears[0][1](x)
        linears[2][1](torch.zeros(3, 8))

    found = largest_inputs([linears[2], linears[0]], run)
    assert found == {"layer2": 1e-12, "layer0": 77.5}
    assert list(found) == ["layer2", "layer0"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_input_that_is_not_finite_is_refused(
    linears: list[tuple[str, nn.Linear]], value: float
) -> None:
    def run() -> None:
        linears[1][1](torch.tensor([[value] * 8]))
        for _, linear in linears:
            linear(torch.ones(1, 8))

    with pytest.raises(ModelError, match=r"inputs of 1 linears .* layer1"):
        largest_inputs(linears, run)


def test_a_linear_that_never_ran_is_refused(linears: list[tuple[str, nn.Linear]]) -> None:
    with pytest.raises(InputError, match="2 linears were never called, the first is layer0"):
        largest_inputs(linears, lambda: linears[1][1](torch.ones(8)))


def test_hooks_go_also_after_an_error(linears: list[tuple[str, nn.Linear]]) -> None:
    def run() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        largest_inputs(linears, run)
    assert sum(hooks_of(linear) for _, linear in linears) == 0


def test_it_writes_the_largest_input_of_every_quantised_linear(pipe: Any, call: Call) -> None:
    before = call(pipe)
    recipe = Recipe(quantize=Quantize(skip=("transformer_blocks.0",)))
    told: list[tuple[int, int]] = []
    found = calibrate_activations(
        pipe, PROMPTS, recipe=recipe, progress=lambda _, done, total: told.append((done, total)),
        **SHORT,
    )  # fmt: skip
    names = [name for name, _ in FLUX1.quantizable(pipe.transformer)]
    assert found.quantize is not None
    assert found.quantize.activations == "static"
    assert found.quantize.fingerprint == fingerprint(pipe.transformer)
    assert found.quantize.amax is not None
    assert list(found.quantize.amax) == [
        name for name in names if not name.startswith("transformer_blocks.0.")
    ]
    assert found.name == "custom-static"
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert hooks_of(pipe.transformer) == 0
    assert torch.equal(call(pipe), before)
    assert Recipe.from_toml(found.to_toml()) == found
    again = calibrate_activations(pipe, PROMPTS, recipe=found, **SHORT)
    assert again == found, "other scales are replaced, and the name does not grow"
    together = calibrate_activations(pipe, PROMPTS, recipe=recipe, batch=2, **SHORT)
    assert together.quantize is not None
    assert together.quantize.amax == pytest.approx(dict(found.quantize.amax), rel=1e-4)


def test_the_recipe_it_writes_works(pipe: Any, call: Call) -> None:
    plain = call(pipe, num_inference_steps=3)
    recipe = Recipe.from_dict({"quantize": {"emulate": True}, "fuse": {}})
    static = calibrate_activations(pipe, PROMPTS, recipe=recipe, **SHORT)
    fast = hasten.optimize(pipe, static, copy=True)
    assert 0 < (call(fast, num_inference_steps=3) - plain).norm() < 0.1 * plain.norm()
    assert "one calibrated scale per linear for its input" in fast.summary()


def test_the_fused_kernels_leave_static_scales_alone(pipe: Any) -> None:
    static = calibrate_activations(pipe, PROMPTS, **SHORT).but(fuse={}, compile=None)
    fast = hasten.optimize(pipe, static, copy=True)
    kinds = {type(part) for part in fast.transformer.modules()}
    assert Fp8Linear in kinds
    assert any('activations = "dynamic"' in note for note in fast.notes)
    insist = static.but(fuse={"kernels": "on"})
    with pytest.raises(UnsupportedError, match='activations = "dynamic"'):
        hasten.optimize(pipe, insist)
    assert Fp8Linear not in {type(part) for part in pipe.transformer.modules()}


def test_scales_of_another_model_are_refused_unless_forced(pipe: Any) -> None:
    static = calibrate_activations(pipe, PROMPTS, recipe=Recipe(quantize=Quantize()), **SHORT)
    with torch.no_grad():
        next(iter(pipe.transformer.parameters())).add_(1)
    with pytest.raises(UnsupportedError, match="calibrated on another model") as caught:
        hasten.optimize(pipe, static)
    assert "force=True" in caught.value.fix
    note = "static scales calibrated on another model, used by force"
    unnamed = static.but(quantize=Quantize(**{**dict(static.quantize), "fingerprint": None}))
    assert note not in hasten.optimize(pipe, unnamed, force=True, copy=True).notes
    fast = hasten.optimize(pipe, static, force=True)
    assert note in fast.notes
    assert note in fast.summary()


@pytest.mark.parametrize(
    ("prompts", "recipe", "fault"),
    [
        ([], "fp8", "no prompts"),
        (PROMPTS, "cache", "quantises nothing"),
        (PROMPTS, Recipe(quantize=Quantize(scheme="int8")), '"int8", but static scales'),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    pipe: Any, prompts: list[str], recipe: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pipe), "__call__", None)
    with pytest.raises(InputError, match=fault):
        calibrate_activations(pipe, prompts, recipe=recipe, **SHORT)


def test_an_optimised_pipeline_is_refused(pipe: Any) -> None:
    hasten.optimize(pipe, Recipe(quantize=Quantize(emulate=True)))
    with pytest.raises(AlreadyOptimizedError):
        calibrate_activations(pipe, PROMPTS, **SHORT)
