"""Quantised linears on a CUDA device: the same numbers as on the CPU, whatever the rows.

CI has no GPU; `pytest -m gpu` on a machine with one runs these.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hasten
from hasten.kernels.quantize import quantize_rows, quantize_tensor
from hasten.machine import machine
from hasten.quality import lpips
from hasten.quantization.linear import Fp8Linear, fp8_product, quantized
from hasten.recipe import Quantize, Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SCHEMES = ("fp8", "int8", "fp8-weight", "int8-weight")


def needs(scheme: str, *, compiled: bool = False) -> None:
    problem = machine().quantize_problem("cuda", scheme, compiled=compiled)
    if problem is not None:
        pytest.skip(problem.fault)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@torch.no_grad()
def test_the_gpu_gives_what_the_cpu_gives(
    scheme: Any, granularity: Any, dtype: torch.dtype, rows: int
) -> None:
    needs(scheme)
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 128).to(dtype), torch.randn(rows, 256).to(dtype)
    recipe = Quantize(scheme=scheme, granularity=granularity)
    here = quantized(linear, recipe.model_copy(update={"emulate": True}))(x).float()
    there = quantized(linear.to("cuda"), recipe)(x.to("cuda"))
    assert there.dtype == dtype
    assert (there.float().cpu() - here).norm() < 0.006 * here.norm()


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@torch.no_grad()
def test_static_scales_give_what_the_cpu_gives(granularity: Any, rows: int) -> None:
    """Some inputs lie beyond the calibrated range: they saturate there too, infinity with them."""
    needs("fp8")
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 128).to(torch.bfloat16), torch.randn(rows, 256).to(torch.bfloat16)
    x[0, 0] = torch.inf
    recipe = Quantize(granularity=granularity, activations="static", amax={"one": 2.5})
    here = quantized(linear, recipe.model_copy(update={"emulate": True}), "one")(x).float()
    there = quantized(linear.to("cuda"), recipe, "one")(x.to("cuda"))
    assert there.isfinite().all()
    assert (there.float().cpu() - here).norm() < 0.006 * here.norm()


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_tensor])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_codes_are_the_cpus(quantize: Any, dtype: torch.dtype) -> None:
    x = torch.randn(200, 512) * torch.logspace(-8, 8, 200).unsqueeze(1)
    codes, scale = quantize(x, dtype)
    there, its_scale = quantize(x.to("cuda"), dtype)
    torch.testing.assert_close(its_scale.cpu(), scale, rtol=1e-6, atol=0)
    assert (there.cpu().float() != codes.float()).float().mean() < 1e-3


@torch.no_grad()
def test_a_product_writes_where_it_is_told() -> None:
    needs("fp8")
    linear = Fp8Linear.from_linear(nn.Linear(256, 128).to("cuda", torch.bfloat16))
    codes = quantize_rows(torch.randn(64, 256, device="cuda"))
    factors = (*codes, linear.weight, linear.weight_scale, linear.bias)
    tall = torch.zeros(256, 128, device="cuda", dtype=torch.bfloat16)
    fp8_product(*factors, out=tall[64:128])
    assert torch.equal(tall[64:128], fp8_product(*factors))
    assert (tall[128:] == 0).all()


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_compiled_linears_match(scheme: Any, granularity: Any) -> None:
    needs(scheme, compiled=True)
    torch._dynamo.reset()
    recipe = Quantize(scheme=scheme, granularity=granularity)
    linear = quantized(nn.Linear(256, 128).to("cuda", torch.bfloat16), recipe)
    x = torch.randn(2, 100, 256, device="cuda", dtype=torch.bfloat16)
    expected = linear(x).float()
    linear.compile(fullgraph=True)
    assert (linear(x).float() - expected).norm() < 0.01 * expected.norm()


def picture(pipe: Any) -> torch.Tensor:
    """1×3×128×128 in [0, 1], float32."""
    images = pipe(
        "a 3D render of a rocket on a blue background",
        num_inference_steps=10,
        height=128,
        width=128,
        guidance_scale=3.0,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return torch.as_tensor(images).float().clamp(0, 1).cpu()


def test_pictures_stay_near_and_weights_shrink() -> None:
    needs("fp8")
    pipe = hasten.load_pipeline("tiny", device="cuda", dtype="bfloat16")
    plain = picture(pipe)
    before = torch.cuda.memory_allocated()
    fast = hasten.optimize(pipe, Recipe.from_dict({"quantize": {}}))
    assert torch.cuda.memory_allocated() < before - 5 * 2**20
    assert lpips(picture(fast), plain).item() <= 0.03
    compiled = Recipe.from_dict({"quantize": {}, "compile": {}})
    for recipe in (compiled, "fp8"):
        pipe = hasten.load_pipeline("tiny", device="cuda", dtype="bfloat16")
        assert lpips(picture(hasten.optimize(pipe, recipe)), plain).item() <= 0.03
