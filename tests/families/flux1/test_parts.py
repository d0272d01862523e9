"""The step taken apart for exported engines is the original forward, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.families.flux1 import FLUX1
from hasten.step.modulations import Modulations, RowReaders


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
    """The velocity by the parts: constants, row, state, blocks, epilogue."""
    parts, conditioning, split = FLUX1.export, FLUX1.conditioning, FLUX1.split
    assert conditioning is not None
    assert split is not None
    latents = arguments["hidden_states"]
    constants = split.embedded(transformer, arguments)
    modulations = Modulations(conditioning.norms(transformer))
    seen = conditioning.rows(transformer, arguments, arguments["timestep"], latents.dtype)
    row = modulations.rows(seen)
    rotary = constants["cos"], constants["sin"]
    state = parts.state(transformer, latents, constants["text"], row, rotary)
    readers, names = RowReaders(modulations), []
    with readers.reading(row):
        for name, after in parts.blocks(transformer, state):
            state = after
            names.append(name)
        output = parts.epilogue(transformer, state)
    readers.detach()
    assert names == [name for name, _ in FLUX1.repeated_blocks(transformer)]
    return output


@pytest.mark.parametrize("ids", ["2-d", "3-d"])
@torch.no_grad()
def test_the_parts_are_the_original_forward(pipe: Any, ids: str) -> None:
    torch.manual_seed(1)
    arguments = inputs(pipe.transformer)
    expected = pipe.transformer(**arguments, return_dict=False)[0]
    if ids == "3-d":
        arguments |= {name: arguments[name][None] for name in ("img_ids", "txt_ids")}
    torch.testing.assert_close(run(pipe.transformer, arguments), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_timestep_is_rounded_as_the_original_does(pipe: Any) -> None:
    """Else the rows would differ by far more than a rounding of them."""
    torch.manual_seed(3)
    transformer = pipe.transformer.to(torch.bfloat16)
    arguments = {
        key: value.to(torch.bfloat16) if key not in ("img_ids", "txt_ids", "guidance") else value
        for key, value in inputs(transformer).items()
    }
    expected = transformer(**arguments, return_dict=False)[0]
    got = run(transformer, arguments)
    assert (got - expected).float().norm() < 0.01 * expected.float().norm()


@pytest.mark.parametrize(
    "beyond",
    [
        {"controlnet_block_samples": [torch.zeros(1)]},
        {"joint_attention_kwargs": {"ip_adapter_image_embeds": []}},
    ],
    ids=["ControlNet", "IP-Adapter"],
)
def test_what_a_body_cannot_take_is_named(beyond: dict[str, Any]) -> None:
    assert FLUX1.split is not None
    assert FLUX1.split.unsupported({"joint_attention_kwargs": {"scale": 0.5}}) is None
    named = FLUX1.split.unsupported(beyond)
    assert named is not None
    assert next(iter(beyond)) in named
