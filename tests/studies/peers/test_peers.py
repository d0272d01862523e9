"""The peers themselves on a small pipeline: they compute what they are told to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from studies.peers.model import call_arguments
from studies.peers.rows import cached, float8, flux_fast, own, plain
from studies.peers.workload import Workload

WORKLOAD = Workload("-", "cpu", "float32", (32,), 6, 1, 8)


def draw(call: Any, pipe: Any, workload: Workload = WORKLOAD) -> torch.Tensor:
    images: torch.Tensor = call(**call_arguments(pipe, workload, 32, 0)).images
    return images


@pytest.fixture
def _settings() -> Iterator[None]:
    """torchao changes inductor's settings: take that back."""
    before = torch._inductor.config.get_config_copy()
    yield
    torch._inductor.config.load_config(before)


@pytest.fixture
def _uncached(pipe: Any) -> Iterator[None]:
    """cache-dit patches the pipeline's class: take that back."""
    cache_dit = pytest.importorskip("cache_dit")
    yield
    cache_dit.disable_cache(pipe)


@pytest.fixture
def runs(pipe: Any) -> list[int]:
    """Counts the runs of the last block, wherever it is called from."""
    counted: list[int] = []
    last = pipe.transformer.single_transformer_blocks[-1]
    last.register_forward_hook(lambda *_: counted.append(1))
    return counted


@pytest.mark.usefixtures("_uncached")
def test_cache_dit_runs_all_blocks_on_the_masks_steps_alone(pipe: Any, runs: list[int]) -> None:
    plain_image = draw(pipe, pipe)
    applied = cached.cached_eager(pipe, "3,6,2", WORKLOAD)
    for variant in ("3", "6", "2"):
        applied.select(variant)
        runs.clear()
        image = draw(applied.call, pipe)
        assert (len(runs), applied.computed()) == (int(variant), int(variant))
        assert torch.equal(image, plain_image) == (variant == "6")
    assert applied.recipe["steps_computation_mask"] == {"3": "101010", "6": "111111", "2": "100100"}


def test_the_eager_row_is_the_pipeline(pipe: Any) -> None:
    before = draw(pipe, pipe)
    applied = plain.eager(pipe, "", WORKLOAD)
    torch.testing.assert_close(draw(applied.call, pipe), before)
    assert applied.computed() == 6


def test_hasten_runs_a_recipe_without_what_does_not_apply(pipe: Any, tmp_path: Any) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "[sampling]\nsteps = 3\n[text]\ncache_mb = 4\n"
        '[cache]\nkind = "interval"\nstart_step = 2\ninterval = 3\n'
    )
    applied = own.optimized(pipe, str(path), WORKLOAD)
    draw(applied.call, pipe)
    assert applied.computed() == 4  # 0, 1, 2 and 5 of the six that the workload asks for
    assert "[text]" not in applied.recipe["hasten.optimize"]
    assert "[cache]" in applied.recipe["hasten.optimize"]
    assert "computed" in applied.summary()


def test_fusing_leaves_the_pictures_as_they_were(pipe: Any) -> None:
    before = draw(pipe, pipe)
    flux_fast.fuse(pipe)
    assert pipe.transformer.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(draw(pipe, pipe), before, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("_settings")
def test_torchao_quantises_the_blocks_linears(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(api, "_check_hardware_support", lambda _: None)  # a CPU emulates it
    pipe.to(torch.bfloat16)
    bfloat16 = Workload("-", "cpu", "bfloat16", (32,), 6, 1, 8)
    before = draw(pipe, pipe, bfloat16).float()
    recipe = float8.quantize_blocks(pipe.transformer)
    blocks, single = pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks
    assert recipe["linears"] == 12 * len(blocks) + 5 * len(single)
    assert type(blocks[0].attn.to_q.weight).__name__ == "Float8Tensor"
    assert type(blocks[0].norm1.linear.weight) is torch.nn.Parameter
    after = draw(pipe, pipe, bfloat16).float()
    assert 0 < (after - before).abs().mean() < 0.1
