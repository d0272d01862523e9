"""The split forward is the original forward, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.errors import UnsupportedError
from hasten.models.family import family_of
from hasten.models.flux import FluxFamily


def inputs(transformer: Any, batch: int = 2, tokens: int = 12, text: int = 5) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": torch.randn(batch, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.randint(0, 9, (tokens, 3)).float(),
        "txt_ids": torch.zeros(text, 3),
    }


def run(transformer: Any, arguments: dict[str, Any]) -> torch.Tensor:
    family = FluxFamily()
    state = family.prologue(transformer, **arguments)
    names = []
    for name, after in family.blocks(transformer, state):
        state = after
        names.append(name)
    assert names == [name for name, _ in family.repeated_blocks(transformer)]
    return family.epilogue(transformer, state)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"joint_attention_kwargs": {}},
        {"double": 1},
        {"double": 2, "single": 2},
        {"double": 2, "repeat": True},
    ],
)
@torch.no_grad()
def test_split_forward_is_bit_equal_to_the_original(pipe: Any, extra: dict[str, Any]) -> None:
    torch.manual_seed(1)
    transformer = pipe.transformer
    arguments = inputs(transformer)
    residual = lambda: torch.randn(2, 12, transformer.inner_dim)  # noqa: E731
    if "double" in extra:
        arguments["controlnet_block_samples"] = [residual() for _ in range(extra["double"])]
        arguments["controlnet_blocks_repeat"] = extra.get("repeat", False)
    if "single" in extra:
        arguments["controlnet_single_block_samples"] = [residual() for _ in range(extra["single"])]
    if "joint_attention_kwargs" in extra:
        arguments["joint_attention_kwargs"] = {}
    expected = transformer(**arguments, return_dict=False)[0]
    assert torch.equal(run(transformer, arguments), expected)


@torch.no_grad()
def test_split_forward_takes_three_dimensional_ids(pipe: Any) -> None:
    torch.manual_seed(2)
    arguments = inputs(pipe.transformer)
    expected = pipe.transformer(**arguments, return_dict=False)[0]
    arguments["img_ids"] = arguments["img_ids"][None]
    arguments["txt_ids"] = arguments["txt_ids"][None]
    assert torch.equal(run(pipe.transformer, arguments), expected)


@torch.no_grad()
def test_split_forward_rounds_the_timestep_as_the_original_does(pipe: Any) -> None:
    torch.manual_seed(3)
    transformer = pipe.transformer.to(torch.bfloat16)
    arguments = {
        key: value.to(torch.bfloat16) if key not in ("img_ids", "txt_ids", "guidance") else value
        for key, value in inputs(transformer).items()
    }
    expected = transformer(**arguments, return_dict=False)[0]
    assert torch.equal(run(transformer, arguments), expected)


def test_an_unknown_family_is_refused_by_name() -> None:
    class Strange:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(UnsupportedError, match="its transformer is a Linear"):
        family_of(Strange())
    with pytest.raises(UnsupportedError, match="it has no transformer"):
        family_of(object())
