"""The engine on a CUDA device, on the bundled model: the same laws as on the CPU, and no host sync.

CI has no GPU; `pytest -m gpu` on a machine with one runs these.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import hasten
from hasten.cli import main
from hasten.quality import psnr
from hasten.recipe import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = 20
ALL_COMPUTED = {"cache": {"kind": "interval", "interval": 1}}
BUDGET = {"cache": {"budget": 7}}
RESIDUAL = {"cache": {"kind": "residual"}}
NEVER_SKIPS = {"cache": {"kind": "residual", "threshold": 1e-12}}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(dtype: str = "bfloat16") -> Any:
    return hasten.load_pipeline("tiny", device="cuda", dtype=dtype)


def image(pipe: Any, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    """1×3×128×128 in [0, 1], float32."""
    pictures = pipe(
        "a 3D render of a rocket on a blue background",
        num_inference_steps=STEPS,
        height=128,
        width=128,
        guidance_scale=3.0,
        max_sequence_length=64,
        output_type="pt",
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    ).images
    return torch.as_tensor(pictures).float().clamp(0, 1)


@pytest.mark.parametrize("recipe", [ALL_COMPUTED, NEVER_SKIPS], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_computed_steps_is_bit_equal(dtype: str, recipe: dict[str, Any]) -> None:
    pipe = tiny(dtype)
    expected = image(pipe)
    assert torch.equal(image(hasten.optimize(pipe, Recipe.from_dict(recipe))), expected)


@pytest.mark.parametrize("recipe", [BUDGET, RESIDUAL], ids=str)
def test_the_gpu_draws_what_the_cpu_draws(recipe: dict[str, Any]) -> None:
    there = image(hasten.optimize(tiny("float32"), Recipe.from_dict(recipe)))
    cpu = hasten.load_pipeline("tiny", device="cpu", dtype="float32")
    here = image(hasten.optimize(cpu, Recipe.from_dict(recipe)))
    assert psnr(there.cpu(), here).item() > 40


@pytest.mark.parametrize("recipe", [BUDGET, RESIDUAL], ids=str)
def test_compiled_blocks_match_and_do_not_recompile_under_a_cache(recipe: dict[str, Any]) -> None:
    expected = image(hasten.optimize(tiny("float32"), Recipe.from_dict(recipe)))
    fast = hasten.optimize(tiny("float32"), Recipe.from_dict({**recipe, "compile": {}}))
    assert psnr(image(fast), expected).item() > 40
    graphs = counters["stats"]["unique_graphs"]
    for seed in range(3):
        image(fast, seed=seed)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("recipe", [{}, BUDGET, {**BUDGET, "compile": {}}], ids=str)
def test_a_step_waits_for_nothing_on_the_device(recipe: dict[str, Any]) -> None:
    """No host sync between the first and the last step: neither Diffusers' loop nor ours."""
    assert waits_of(hasten.optimize(tiny(), Recipe.from_dict(recipe))) == []


def test_the_residual_waits_once_a_decision() -> None:
    """None in the warm-up, then one a step: with no skips, every step has to be decided."""
    fast = hasten.optimize(tiny(), Recipe.from_dict(NEVER_SKIPS))
    assert len(waits_of(fast)) == STEPS - 1 - fast.recipe.cache.warmup_steps


def waits_of(fast: Any) -> list[str]:
    """What waited for the device from the second to the last step but one."""
    image(fast)  # compilation and lazy initialisation may wait

    def watch(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        torch.cuda.set_sync_debug_mode("warn" if step < STEPS - 2 else "default")
        return {}

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            image(fast, callback_on_step_end=watch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(said.message) for said in heard if "synchronizing CUDA" in str(said.message)]


@pytest.mark.parametrize("recipe", [ALL_COMPUTED, NEVER_SKIPS], ids=str)
def test_offloading_frees_the_device_and_changes_nothing(recipe: dict[str, Any]) -> None:
    expected = image(tiny())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    fast = hasten.optimize(tiny(), Recipe.from_dict({**recipe, "offload": {"kind": "model"}}))
    on_device = torch.cuda.memory_allocated() - before
    weights = sum(p.numel() * 2 for p in fast.pipe.transformer.parameters())
    assert on_device < weights / 10
    assert torch.equal(image(fast), expected)
    assert torch.cuda.memory_allocated() - before < weights / 2
    plain = fast.restore()
    assert plain.device.type == "cuda"
    assert torch.equal(image(plain), expected)


def test_generate_and_calibrate_run_on_the_device(tmp_path: Path) -> None:
    schedule, picture = tmp_path / "schedule.toml", tmp_path / "rocket.png"
    common = ["--device", "cuda", "--steps", "12", "--out"]
    learn = ["calibrate", *common, str(schedule), "--budget", "5", "--limit", "4"]
    draw = ["generate", *common, str(picture), "a rocket", "--recipe", str(schedule)]
    assert main(learn) == 0
    assert main(draw) == 0
    assert picture.stat().st_size > 1000


def test_a_benchmark_on_the_device_counts_its_memory(tmp_path: Path) -> None:
    command = ["bench", "--device", "cuda", "--recipes", "cache", "--limit", "2", "--steps", "12"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert "GPU" in results["environment"]["device"] or "NVIDIA" in results["environment"]["device"]
    for row in results["rows"]:
        assert row["status"] == "ok"
        assert row["peak_memory_bytes"] > row["weights_bytes"] / 2
    again = next(row for row in results["rows"] if row["recipe"] == "baseline-again")
    assert again["quality"][0]["lpips"] == 0
