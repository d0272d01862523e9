"""Blocks on an engine: a body in their place draws what they draw, and the rest is said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.engines.tensorrt.step import Step
from hasten.errors import CallError
from hasten.families import family_of
from hasten.passes.cache.layer import cache_steps
from hasten.passes.cache.plan import Planner
from hasten.passes.cache.policy_planned import PlannedPolicy
from hasten.passes.engine import run_on_engine
from hasten.passes.offload import offload_modulations
from hasten.recipe import IntervalCache
from hasten.step.applied import Applied
from hasten.step.chain import StepChain
from hasten.step.run import SchedulerOf

Call = Callable[..., torch.Tensor]


class Run:
    """A body that runs the blocks of a copy in torch, as an exported graph would."""

    def __init__(self, pipe: Any) -> None:
        self.step = Step(copy.deepcopy(pipe.transformer), family_of(pipe))
        self.calls = 0
        self.closed = 0

    def __call__(self, latents: torch.Tensor, **constants: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        velocity: torch.Tensor = self.step(latents, **constants)
        return velocity

    def close(self) -> None:
        self.closed += 1


def chain_of(pipe: Any) -> StepChain:
    return StepChain(pipe.transformer, SchedulerOf(pipe))


def on_engine(pipe: Any, *, release: bool = False) -> tuple[Run, Applied]:
    body = Run(pipe)
    done = run_on_engine(
        chain_of(pipe), family_of(pipe), body, "a copy in torch", close=body.close, release=release
    )
    return body, done


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_images_per_prompt": 2},
        {"true_cfg_scale": 2.0, "negative_prompt": "blurry"},
        {"width": 64, "max_sequence_length": 12},
    ],
    ids=["plain", "two images", "true guidance", "another size"],
)
def test_the_latents_are_the_plain_pipelines(
    pipe: Any, call: Call, arguments: dict[str, Any]
) -> None:
    expected = call(pipe, **arguments)
    body, done = on_engine(pipe)
    torch.testing.assert_close(call(pipe, **arguments), expected, rtol=1e-4, atol=1e-4)
    assert body.calls == (12 if "true_cfg_scale" in arguments else 6)
    assert "a copy in torch" in done.description
    assert done.undo is not None
    done.undo()
    assert body.closed == 1
    assert torch.equal(call(pipe, **arguments), expected)
    assert "forward" not in pipe.transformer.__dict__


def test_skipped_steps_never_enter_the_engine(pipe: Any, call: Call) -> None:
    body, _ = on_engine(pipe)
    chain = pipe.transformer.forward
    cache_steps(chain, PlannedPolicy(Planner(IntervalCache(interval=3), None)))
    call(pipe, num_inference_steps=9)
    assert 0 < body.calls < 9


def test_released_blocks_hold_nothing_and_the_pictures_stay(
    pipe: Any, call: Call, tmp_path: Path
) -> None:
    expected = call(pipe)
    before = sum(parameter.nbytes for parameter in pipe.transformer.parameters())
    _, done = on_engine(pipe, release=True)
    after = sum(parameter.nbytes for parameter in pipe.transformer.parameters())
    assert after < before / 2
    assert "torch weights freed" in done.description
    assert "engine.release" in done.cannot_undo
    with pytest.raises(CallError, match="cannot be saved"):
        pipe.save_pretrained(tmp_path)
    assert not list((tmp_path / "transformer").rglob("*.safetensors"))
    pipe.to(torch.device("cpu"))
    torch.testing.assert_close(call(pipe), expected, rtol=1e-4, atol=1e-4)


def test_undone_after_a_release_the_engine_is_closed_and_calls_say_why_not(
    pipe: Any, call: Call
) -> None:
    body, done = on_engine(pipe, release=True)
    assert done.undo is not None
    done.undo()
    assert body.closed
    with pytest.raises(CallError, match=r"engine\.release = true\), so it cannot run") as caught:
        call(pipe)
    assert "load the pipeline again" in caught.value.fix


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_weights_that_change_afterwards_are_noticed(pipe: Any, call: Call, how: str) -> None:
    on_engine(pipe)
    call(pipe)
    linear = pipe.transformer.transformer_blocks[1].attn.to_q
    if how == "in place":
        with torch.no_grad():
            linear.weight.mul_(1.5)
    else:
        linear.weight = torch.nn.Parameter(linear.weight.detach().clone())
    with pytest.raises(CallError, match=r"transformer_blocks\.1\.attn\.to_q\.weight was replaced"):
        call(pipe)


def test_modulations_may_wait_in_host_memory(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    on_engine(pipe)
    offload_modulations(family_of(pipe).modulated_norms(pipe.transformer), torch.device("cpu"))
    torch.testing.assert_close(call(pipe), expected, rtol=1e-4, atol=1e-4)


def test_what_the_engine_cannot_take_is_refused(pipe: Any) -> None:
    on_engine(pipe)
    inputs = {
        "hidden_states": torch.zeros(1, 4, 64),
        "encoder_hidden_states": torch.zeros(1, 3, 24),
        "pooled_projections": torch.zeros(1, 16),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "controlnet_block_samples": [torch.zeros(1, 4, 32)],
    }
    with pytest.raises(CallError, match="ControlNet") as caught:
        pipe.transformer(**inputs)
    assert "[engine]" in caught.value.fix
