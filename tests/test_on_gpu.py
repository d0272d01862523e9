"""The engine on a CUDA device, on the bundled model: the same laws as on the CPU, and no host sync.

CI has no GPU; `pytest -m gpu` on a machine with one runs these.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from torch._dynamo.utils import counters

import hasten
from hasten import HastenError
from hasten.cli import main
from hasten.quality import lpips, psnr
from hasten.recipe import Recipe, resolve
from hasten.step.graphs import Graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = 20
ALL_COMPUTED = {"cache": {"kind": "interval", "interval": 1}}
BUDGET = {"cache": {"budget": 7}}
RESIDUAL = {"cache": {"kind": "residual"}}
NEVER_SKIPS = {"cache": {"kind": "residual", "threshold": 1e-12}}
GRAPHED = {
    "kernels": {"fuse": {"kernels": "on"}, "compile": {"mode": "none", "cuda_graphs": "on"}},
    "table": {"fuse": {"kernels": "off"}, "compile": {"mode": "none", "cuda_graphs": "on"}},
    "forward": {"compile": {"mode": "none", "cuda_graphs": "on"}},
}
CONTROLLED = (
    GRAPHED["table"],
    GRAPHED["forward"],
    {"fuse": {}, "compile": {"mode": "none", "cuda_graphs": "auto"}},
)
ROCKET = "a 3D render of a rocket on a blue background"
CHANGES: list[dict[str, Any]] = [
    {"prompt": "a 3D render of a red kite on a green background"},
    {"guidance_scale": 1.5},
    {"height": 96, "width": 160},
    {"prompt": [ROCKET, "a teapot"]},
    {"true_cfg_scale": 2.0, "negative_prompt": "a cat"},
    {"num_inference_steps": 7},
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(dtype: str = "bfloat16") -> Any:
    return hasten.load_pipeline("tiny", device="cuda", dtype=dtype)


def image(pipe: Any, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    """B×3×128×128 in [0, 1], float32, where the arguments do not say otherwise."""
    arguments = {
        "prompt": ROCKET,
        "num_inference_steps": STEPS,
        "height": 128,
        "width": 128,
        "guidance_scale": 3.0,
        "max_sequence_length": 64,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed),
    }
    pictures = pipe(**{**arguments, **kwargs}).images
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


def test_lossless_draws_what_the_plain_pipeline_draws() -> None:
    expected = image(tiny())
    fast = hasten.optimize(tiny(), "lossless")
    assert psnr(image(fast), expected).item() >= 40
    assert psnr(image(fast, seed=1), image(tiny(), seed=1)).item() >= 40
    assert "fused kernels, unquantised products" in fast.summary()
    assert psnr(image(fast.restore()), expected).item() == 100


def test_fp8_stays_near_to_bfloat16() -> None:
    plain, fast = tiny(), hasten.optimize(tiny(), "fp8")
    distances = [lpips(image(fast, seed=seed), image(plain, seed=seed)).item() for seed in range(4)]
    assert sum(distances) / len(distances) <= 0.03, distances
    assert "fused kernels, FP8 products" in fast.summary()


@pytest.mark.parametrize("name", GRAPHED)
def test_graphs_follow_every_change_of_a_call(name: str) -> None:
    """A pipeline that has recorded other calls draws what one does that has recorded none."""
    recipe = Recipe.from_dict(GRAPHED[name])
    used = hasten.optimize(tiny("float32"), recipe)
    image(used)
    for change in [*CHANGES, {}]:
        fresh = hasten.optimize(tiny("float32"), recipe)
        assert torch.equal(image(used, **change), image(fresh, **change)), change
        plain = image(tiny("float32"), **change)
        assert psnr(image(used, **change), plain).min().item() >= 40, change


def with_controlnet(dtype: str = "float32") -> Any:
    """The bundled model with a random ControlNet, which changes the picture (checked below)."""
    pipe = tiny(dtype)
    takes = inspect.signature(FluxControlNetModel.__init__).parameters
    config = {name: value for name, value in pipe.transformer.config.items() if name in takes}
    torch.manual_seed(0)
    controlnet = FluxControlNetModel(**{**config, "num_layers": 1, "num_single_layers": 1})
    for linear in (*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks):
        torch.nn.init.normal_(linear.weight, std=0.02)
    return FluxControlNetPipeline(
        **pipe.components, controlnet=controlnet.to(pipe.device, pipe.dtype)
    )


@pytest.mark.parametrize("recipe", CONTROLLED, ids=str)
def test_controlnet_residuals_are_inputs_of_a_graph(recipe: dict[str, Any]) -> None:
    control = torch.linspace(0, 1, 3 * 128 * 128).reshape(1, 3, 128, 128)
    plain, fast = with_controlnet(), hasten.optimize(with_controlnet(), Recipe.from_dict(recipe))
    expected = image(plain, control_image=control)
    without = image(plain, control_image=control, controlnet_conditioning_scale=0.0)
    assert psnr(without, expected).item() < 30
    for _ in range(2):
        assert psnr(image(fast, control_image=control), expected).item() >= 40
    assert "1 recorded" in fast.summary()
    assert "ran without" not in fast.summary()


def test_the_memory_of_graphs_is_reported() -> None:
    fast = hasten.optimize(tiny(), "lossless")
    assert "(0 recorded, 0 MiB)" in fast.summary()
    image(fast)
    image(fast, height=512, width=512)  # 1088 tokens: some MiB of activations
    (line,) = [line for line in fast.summary().splitlines() if "cuda graphs" in line]
    recorded, mebibytes = line.partition("(")[2].rstrip(")").split(", ")
    assert recorded == "2 recorded"
    assert int(mebibytes.removesuffix(" MiB")) > 0


def test_a_second_resolution_is_recorded_beside_the_first() -> None:
    plain, fast = tiny(), hasten.optimize(tiny(), "lossless")
    for size in ({}, {"height": 64, "width": 192}, {}):
        assert psnr(image(fast, **size), image(plain, **size)).item() >= 40


def test_a_step_of_balanced_waits_for_nothing() -> None:
    """From the second step on, computed and skipped ones alike, waiting is an error."""
    fast = hasten.optimize(tiny(), "balanced")
    expected = image(fast)  # records, compiles and tries backends

    def forbid(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        torch.cuda.set_sync_debug_mode("error" if step < STEPS - 2 else "default")
        return {}

    try:
        assert torch.equal(image(fast, callback_on_step_end=forbid), expected)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < fast.last_run.computed < STEPS
    assert "1 recorded" in fast.summary()


def test_out_of_memory_while_recording_leaves_a_pipeline_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The allocator refuses in the middle of a capture, then no more."""
    plain, fast = tiny(), hasten.optimize(tiny(), "lossless")
    image(fast)
    capture, state = Graphs._capture, {"calls": 0}

    def greedy(graphs: Any, function: Any, inputs: Any, device: Any) -> Any:
        def too_much(*values: torch.Tensor) -> torch.Tensor:
            state["calls"] += 1
            if torch.cuda.is_current_stream_capturing():
                torch.empty(2**50, dtype=torch.uint8, device=device)
            velocity: torch.Tensor = function(*values)
            return velocity

        return capture(graphs, too_much, inputs, device)

    monkeypatch.setattr(Graphs, "_capture", greedy)
    with pytest.raises(HastenError, match="out of GPU memory while recording") as caught:
        image(fast, height=192, width=192)
    assert "cuda_graphs" in caught.value.fix
    assert state["calls"] == 3, "it was to fail while capturing"
    monkeypatch.setattr(Graphs, "_capture", capture)
    for size in ({}, {"height": 192, "width": 192}):
        assert psnr(image(fast, **size), image(plain, **size)).item() >= 40


def test_a_trial_of_backends_leaves_the_users_random_numbers_alone() -> None:
    fast = hasten.optimize(tiny(), "lossless")
    torch.cuda.manual_seed(0)
    before = torch.cuda.get_rng_state()
    image(fast)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert "for 1×" in fast.summary()


def test_modulation_weights_wait_in_host_memory() -> None:
    expected = image(hasten.optimize(tiny(), "lossless"))
    plain = tiny()
    recipe = resolve("lossless").but(offload={"kind": "modulation"})
    fast = hasten.optimize(plain, recipe, copy=True)
    linears = [
        fast.transformer.norm_out.linear,
        fast.transformer.transformer_blocks[0].norm1.linear,
    ]
    assert all(linear.weight.device.type == "cpu" for linear in linears)
    assert plain.transformer.norm_out.linear.weight.device.type == "cuda", "the other pipeline's"
    assert psnr(image(fast), expected).item() >= 40  # the trials may choose another backend
    fast.restore()
    assert all(linear.weight.device.type == "cuda" for linear in linears)


@pytest.mark.parametrize("scheme", ["fp8-weight", "int8-weight"])
def test_a_text_encoder_in_eight_bits_draws_on_the_device(scheme: str) -> None:
    expected = image(tiny())
    fast = hasten.optimize(tiny(), Recipe.from_dict({"text": {"scheme": scheme}}))
    codes = fast.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight
    assert codes.device.type == "cuda"
    assert codes.dtype.itemsize == 1
    assert lpips(image(fast), expected).item() < 0.05


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
    assert results["environment"]["gpu"] == torch.cuda.get_device_name()
    for row in results["rows"]:
        assert row["status"] == "ok"
        assert row["peak_memory_bytes"] > row["weights_bytes"] / 2
    again = next(row for row in results["rows"] if row["recipe"] == "baseline-again")
    assert again["quality"][0]["lpips"] == 0
