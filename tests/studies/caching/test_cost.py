"""Counting what a transformer computes, against counts by hand and PyTorch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from studies.caching.cost import Unit, metered
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TOKENS, TEXT, WIDTH, BLOCKS = 16, 8, 32, 3


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=BLOCKS - 1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def call(transformer: Any, batch: int = 1, time: float = 0.5) -> Any:
    torch.manual_seed(1)
    with torch.no_grad(), transformer.cache_context("cond"):
        return transformer(
            hidden_states=torch.randn(batch, TOKENS, 16) + time,
            encoder_hidden_states=torch.randn(batch, TEXT, 24),
            pooled_projections=torch.randn(batch, 12),
            timestep=torch.full((batch,), time),
            img_ids=torch.zeros(TOKENS, 3),
            txt_ids=torch.zeros(TEXT, 3),
            return_dict=False,
        )


def attention_madds() -> int:
    """Scores and mixing, each tokens² × width, in every block."""
    return BLOCKS * 2 * (TOKENS + TEXT) ** 2 * WIDTH


def test_linear_layers_agree_with_pytorchs_counter(transformer: Any) -> None:
    with FlopCounterMode(display=False) as counter:
        call(transformer)
    # PyTorch counts two per multiply-add and, on a CPU, no attention.
    expected = counter.get_total_flops() / 2 + attention_madds()
    with metered(transformer) as meter:
        call(transformer)
    assert meter.calls == [expected]


def test_cost_is_per_image(transformer: Any) -> None:
    with metered(transformer) as meter:
        call(transformer, batch=1)
        call(transformer, batch=3)
    assert meter.calls[1] == pytest.approx(meter.calls[0])


def test_a_skipped_step_is_charged_its_first_block(transformer: Any) -> None:
    with metered(transformer) as meter:
        call(transformer)
        full = meter.take()
        blocks: list[float] = []
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
            blocks.append(weights)
        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        call(transformer)
        call(transformer)
    first, skipped = meter.calls
    assert first == full[0]
    # What is missing is the two single blocks: every linear in them sees all tokens, but the
    # modulation, which sees one row; and their attention.
    single = transformer.single_transformer_blocks[0]
    rows = TOKENS + TEXT
    modulation = single.norm.linear.weight.numel()
    missing = sum((weights - modulation) * rows + modulation for weights in blocks[1:])
    missing += (BLOCKS - 1) * 2 * rows**2 * WIDTH
    assert first - skipped == missing


def test_unit_counts_both_branches_of_true_cfg() -> None:
    unit = Unit.of([10.0, 10.0])
    calls = [10.0, 10.0, 1.0, 1.0, 10.0, 10.0]
    assert unit.evaluations(calls) == pytest.approx(2.1)
    assert unit.computed(calls) == 2


def test_a_partial_call_can_be_charged_as_in_a_deeper_model() -> None:
    unit = Unit(madds=11.0, branches=1, partial=11 / 57)
    assert unit.evaluations([11.0, 1.0]) == pytest.approx(1 + 1 / 57)


def test_a_failing_call_leaves_no_counter_behind(transformer: Any) -> None:
    with pytest.raises(TypeError), metered(transformer):
        transformer()
    with metered(transformer) as meter:
        call(transformer)
    assert len(meter.calls) == 1
