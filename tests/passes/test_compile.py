"""Compilation: equal results within rounding, one compilation a block class, no recompilation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import hasten
from hasten.errors import UnsupportedError
from hasten.machine import machine
from hasten.recipe import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        machine().compile_problem("cpu") is not None, reason="torch.compile cannot work here"
    ),
]

Call = Callable[..., torch.Tensor]

# One for the double-stream blocks; two for the single-stream ones, because the first of them gets
# its tokens contiguous and the others get a view of their predecessor's concatenation.
GRAPHS = 3


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_blocks_compile_once_a_class_and_match_eager(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = hasten.optimize(pipe, "compile")
    torch.testing.assert_close(call(fast), expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == GRAPHS
    assert "2 × FluxTransformerBlock, 2 × FluxSingleTransformerBlock" in fast.summary()
    fast.restore()
    assert torch.equal(call(pipe), expected)


def test_the_step_decision_stays_outside_the_compiled_code(pipe: Any, call: Call) -> None:
    """Cached and computed steps, another plan, prompt, seed, steps: still the same graphs."""
    fast = hasten.optimize(pipe, "cache-compile")
    call(fast, num_inference_steps=9)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == GRAPHS
    call(fast, "another prompt", num_inference_steps=12, seed=4, guidance_scale=2.0)
    call(fast, num_inference_steps=5, true_cfg_scale=2.0, negative_prompt="blurry")
    assert counters["stats"]["unique_graphs"] == graphs


def test_dynamic_shapes_compile_once_for_one_image_and_once_for_several(
    pipe: Any, call: Call
) -> None:
    """Other sizes, text lengths and steps are within what `dynamic = true` declares."""
    fast = hasten.optimize(pipe, Recipe.from_dict({"compile": {"dynamic": True}}))

    def graphs() -> int:
        call(fast, num_inference_steps=3, width=64)
        call(fast, num_inference_steps=2, height=48, width=80, max_sequence_length=12)
        return int(counters["stats"]["unique_graphs"])

    call(fast, num_inference_steps=2)
    one = counters["stats"]["unique_graphs"]
    assert graphs() == one
    call(fast, num_inference_steps=2, num_images_per_prompt=2)
    several = counters["stats"]["unique_graphs"]
    assert several <= 2 * one
    call(fast, num_inference_steps=2, num_images_per_prompt=3, height=48)
    assert graphs() == several


def test_cached_and_compiled_is_cached(make_pipe: Callable[[], Any], call: Call) -> None:
    cached = call(hasten.optimize(make_pipe(), "cache"))
    both = call(hasten.optimize(make_pipe(), "cache-compile"))
    torch.testing.assert_close(both, cached, rtol=1e-4, atol=1e-4)


def test_the_whole_forward_compiles_under_a_cache(pipe: Any, call: Call) -> None:
    recipe = Recipe.from_dict({"compile": {"mode": "full"}, "cache": {"interval": 2}})
    plain = call(hasten.optimize(pipe, Recipe.from_dict({"cache": {"interval": 2}}), copy=True))
    fast = hasten.optimize(pipe, recipe)
    torch.testing.assert_close(call(fast), plain, rtol=1e-4, atol=1e-4)
    fast.restore()
    assert "forward" not in pipe.transformer.__dict__


def test_a_failing_compiler_is_one_line_and_the_fix_works(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = hasten.optimize(pipe, "compile")
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with (
        fresh_cache(),
        no_compiler,
        pytest.raises(UnsupportedError, match=r"torch\.compile failed: ") as caught,
    ):
        call(fast)
    assert len(caught.value.faults) == 1
    assert len(caught.value.faults[0]) < 300
    assert "without [compile]" in caught.value.fix
    assert torch.equal(call(fast.restore()), expected)


@pytest.mark.usefixtures("no_code")
def test_the_recompile_limit_says_what_to_declare(pipe: Any, call: Call) -> None:
    fast = hasten.optimize(pipe, Recipe.from_dict({"compile": {"dynamic": False}}))

    def resize() -> None:
        for width in (32, 48, 64):
            call(fast, num_inference_steps=1, width=width)

    with (
        torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True),
        pytest.raises(UnsupportedError, match="recompile limit") as caught,
    ):
        resize()
    assert "compile.dynamic = true" in caught.value.fix


@pytest.mark.usefixtures("no_code")
def test_pipelines_beyond_torchs_limit_compile_and_restore_frees_code(
    make_pipe: Callable[[], Any], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo counts compilations per class over all pipelines, and its limit is eight; here two."""
    recipe = Recipe.from_dict({"compile": {"dynamic": False}})

    def draw(width: int) -> hasten.OptimizedPipeline:
        fast = hasten.optimize(make_pipe(), recipe)
        call(fast, num_inference_steps=1, width=width)
        return fast

    monkeypatch.setattr("hasten.passes.compile.TORCHS_LIMIT", 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        first = [draw(width) for width in (32, 48)]
        monkeypatch.setattr("hasten.passes.compile.OWN_LIMIT", 2)
        with pytest.raises(UnsupportedError, match="recompile limit"):
            draw(64)
        first[0].restore()
        draw(32)


def test_importing_the_pipeline_loads_no_compiler() -> None:
    code = "import sys, hasten.pipeline; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
