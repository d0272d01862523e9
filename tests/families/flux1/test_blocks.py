"""The split forward is the original forward, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.errors import CallError, UnsupportedError
from hasten.families.family import family_of
from hasten.families.flux1.blocks import FluxFamily, FluxState


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


@pytest.mark.parametrize(
    "extra", [{}, {"joint_attention_kwargs": {"scale": 0.5}}, {"return_dict": False}]
)
@torch.no_grad()
def test_a_call_goes_through_to_the_same_output(pipe: Any, extra: dict[str, Any]) -> None:
    """All blocks run in the middle; arguments by name or by position."""
    torch.manual_seed(4)
    transformer, family = pipe.transformer, FluxFamily()
    arguments = inputs(transformer)
    expected = transformer(**{**arguments, **extra, "return_dict": False})[0]

    def middle(state: FluxState) -> FluxState:
        assert not state.kwargs
        return [after for _, after in family.blocks(transformer, state)][-1]

    assert torch.equal(family.through(transformer, middle, (), {**arguments, **extra}), expected)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    first = tuple(arguments.pop(name) for name in names)
    assert torch.equal(family.through(transformer, middle, first, {**arguments, **extra}), expected)


@torch.no_grad()
def test_lora_layers_are_scaled_for_a_call_and_no_longer(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, float]] = []
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", True)
    for name in ("scale_lora_layers", "unscale_lora_layers"):
        monkeypatch.setattr(
            f"diffusers.utils.peft_utils.{name}",
            lambda model, weight, name=name: heard.append((name, weight)),
        )

    def explode(state: FluxState) -> FluxState:
        heard.append(("blocks", 0))
        raise ZeroDivisionError

    arguments = {**inputs(pipe.transformer), "joint_attention_kwargs": {"scale": 0.5}}
    with pytest.raises(ZeroDivisionError):
        FluxFamily().through(pipe.transformer, explode, (), arguments)
    assert heard == [("scale_lora_layers", 0.5), ("blocks", 0), ("unscale_lora_layers", 0.5)]


def test_an_argument_that_the_split_does_not_know_is_refused(pipe: Any) -> None:
    arguments = {**inputs(pipe.transformer), "depth": torch.zeros(1)}
    with pytest.raises(CallError, match="block by block with depth"):
        FluxFamily().through(pipe.transformer, lambda state: state, (), arguments)


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
