"""The pipeline that `optimize` returns: threads, copies, siblings, saving, a lost handle."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
)

import hasten
from hasten import (
    AlreadyOptimizedError,
    CallError,
    HastenError,
    OptimizedPipeline,
    Recipe,
    UnsupportedError,
)
from hasten.models.fingerprint import fingerprint
from tests.passes.test_fuse import close

Call = Callable[..., torch.Tensor]

CACHE = {"cache": {"start_step": 1, "interval": 2}}
TABLE = {"fuse": {"kernels": "off"}}
KERNELS = {"fuse": {"kernels": "on"}}
RESIDUAL = {"cache": {"kind": "residual", "threshold": 0.9, "warmup_steps": 2}}
INT8 = {"quantize": {"scheme": "int8"}}


def optimized(pipe: Any, sections: dict[str, Any], **arguments: Any) -> OptimizedPipeline:
    return hasten.optimize(pipe, Recipe.from_dict(sections), **arguments)


def nudged(pipe: Any) -> Any:
    """The pipeline with other weights."""
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith("proj_out.weight"):
                parameter.mul_(1.05)
    return pipe


# --- threads --------------------------------------------------------------------------------------


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call gives, made in threads that begin together."""
    given: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(number: int) -> None:
        start.wait()
        given[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


@pytest.mark.parametrize("sections", [{}, CACHE, TABLE, RESIDUAL, KERNELS], ids=str)
def test_calls_of_one_pipeline_wait_in_line(
    sections: dict[str, Any], pipe: Any, call: Call
) -> None:
    fast = optimized(pipe, sections)
    alone = [call(fast, seed=seed, num_inference_steps=3 + seed) for seed in range(2)]

    def several(seed: int) -> list[torch.Tensor]:
        return [call(fast, seed=seed, num_inference_steps=3 + seed) for _ in range(20)]

    for seed, pictures in enumerate(at_once(lambda: several(0), lambda: several(1))):
        assert all(torch.equal(picture, alone[seed]) for picture in pictures)


@pytest.mark.parametrize("sections", [CACHE, TABLE, RESIDUAL], ids=str)
def test_siblings_with_schedulers_of_their_own_wait_in_line(
    sections: dict[str, Any], pipe: Any, call: Call
) -> None:
    fast = optimized(pipe, sections)
    pipes = [
        fast.from_pipe(FluxPipeline, scheduler=copy.deepcopy(pipe.scheduler)) for _ in range(2)
    ]
    alone = [call(one, seed=seed) for seed, one in enumerate(pipes)]
    together = at_once(
        *(lambda one=one, seed=seed: call(one, seed=seed) for seed, one in enumerate(pipes))
    )
    assert all(map(torch.equal, together, alone))


def test_a_copy_has_tokenizers_of_its_own(pipe: Any) -> None:
    twin = optimized(pipe, CACHE, copy=True)
    assert twin.tokenizer is not pipe.tokenizer
    assert twin.tokenizer_2 is not pipe.tokenizer_2


def test_a_call_from_within_its_own_callback_is_refused(pipe: Any, call: Call) -> None:
    fast = optimized(pipe, CACHE)
    expected = call(fast)
    sibling = fast.from_pipe(FluxPipeline)  # shares the scheduler
    for victim in (fast, sibling):

        def nested(_: Any, step: int, *__: Any, victim: Any = victim) -> dict[str, Any]:
            if step == 2:
                call(victim)
            return {}

        with pytest.raises(CallError, match="during its own call") as caught:
            call(fast, callback_on_step_end=nested)
        assert "its own scheduler" in caught.value.fix
        assert torch.equal(call(fast), expected)


def test_a_plain_call_in_the_middle_of_a_run_is_noticed(pipe: Any, call: Call) -> None:
    fast = optimized(pipe, CACHE)
    expected = call(fast)

    def nested(_: Any, step: int, *__: Any) -> dict[str, Any]:
        if step == 2:
            pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5), mu=0.5)
        return {}

    with pytest.raises(CallError, match="set to other timesteps during a run"):
        call(fast, callback_on_step_end=nested)
    assert torch.equal(call(fast), expected)


# --- copies and siblings --------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [CACHE, TABLE, KERNELS, RESIDUAL, INT8, {}], ids=str)
def test_a_deep_copy_draws_with_its_own_weights(
    sections: dict[str, Any], make_pipe: Callable[[], Any], call: Call
) -> None:
    expected = call(optimized(nudged(make_pipe()), sections))
    fast = optimized(make_pipe(), sections)
    before = call(fast)
    twin = copy.deepcopy(fast)
    assert type(twin) is OptimizedPipeline
    if sections is not INT8:
        nudged(twin)
        assert close(call(twin), expected)
    assert torch.equal(call(fast), before)
    if sections is not INT8:
        plain = twin.restore()
        assert "forward" not in plain.transformer.__dict__
        assert torch.equal(call(fast), before), "restoring the copy restored the original"


def test_what_is_done_to_a_copy_stays_there(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = optimized(pipe, CACHE, copy=True)
    fast.to(torch.bfloat16)
    assert fast.transformer.dtype == torch.bfloat16
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {
        torch.float32
    }
    assert torch.equal(call(pipe), expected)


def test_adapters_fused_into_a_copy_stay_there(
    pipe: Any, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fusing writes to the weights in place, and the copy shares their memory."""

    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.base_layer(x)
            return output

    def fuse(transformer: Any, *_: Any, **__: Any) -> None:
        for module in transformer.modules():
            if isinstance(module, Adapter):
                module.base_layer.weight.data += 1.0

    monkeypatch.setattr(type(pipe.transformer), "fuse_lora", fuse)
    expected = call(pipe)
    fast = optimized(pipe, CACHE, copy=True)
    block = fast.transformer.transformer_blocks[0]
    block.attn.to_q = Adapter(block.attn.to_q)
    fast.transformer.fuse_lora()
    assert torch.equal(call(pipe), expected)
    assert not torch.equal(call(fast), expected)


def test_a_plain_copy_of_an_optimised_pipeline(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = optimized(pipe, {**CACHE, **TABLE})
    cached = call(fast)
    twin = hasten.optimize(pipe, "baseline", copy=True)
    assert torch.equal(call(twin), expected)
    assert torch.equal(call(fast), cached), "it is optimised as before"
    quantised = optimized(pipe, INT8, copy=True)
    with pytest.raises(AlreadyOptimizedError, match="cannot be copied as plain"):
        hasten.optimize(quantised, "baseline", copy=True)


def test_siblings_share_what_was_done(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = optimized(pipe, CACHE)
    sibling = fast.from_pipe(FluxPipeline)
    call(sibling)
    assert (sibling.last_run.steps, sibling.last_run.computed) == (6, 4)
    fast.restore()
    assert torch.equal(call(sibling), expected)
    assert (sibling.last_run.steps, sibling.last_run.computed) == (6, 6)
    assert "nothing changed" in sibling.summary()


def test_siblings_keep_the_dtypes_of_components(pipe: Any) -> None:
    pipe.transformer.to(torch.bfloat16)
    fast = optimized(pipe, CACHE)
    assert fast.from_pipe(FluxImg2ImgPipeline).vae.dtype == pipe.vae.dtype == torch.float32
    assert pipe.transformer.dtype == torch.bfloat16
    assert "to" not in pipe.vae.__dict__


def test_an_exchanged_transformer_runs_plain_and_is_counted_so(
    make_pipe: Callable[[], Any], call: Call
) -> None:
    fast, other = optimized(make_pipe(), CACHE), make_pipe()
    fast.transformer = nudged(other).transformer
    assert torch.equal(call(fast), call(other))
    assert (fast.last_run.steps, fast.last_run.computed) == (6, 6)
    assert any("transformer was replaced" in note for note in fast.notes)
    assert "transformer was replaced" in fast.summary()


def test_a_schedule_is_not_calibrated_for_changed_weights(pipe: Any, call: Call) -> None:
    schedule = {
        "kind": "schedule", "steps": 6, "compute": [0, 2, 4],
        "fingerprint": fingerprint(pipe.transformer),
    }  # fmt: skip
    fast = optimized(pipe, {"cache": schedule})
    call(fast)
    assert fast.calibrated is True
    assert "schedule: learned on this model" in fast.summary()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(0.5)
    assert fast.calibrated is False
    assert "calibrated: false" in fast.summary()
    assert any("weights changed after optimising" in note for note in fast.notes)
    hasten.optimize(fast, "baseline", copy=True)  # which undoes the recipe and applies it again
    assert fast.calibrated is False


# --- the object itself ----------------------------------------------------------------------------


def test_to_returns_the_optimised_pipeline(pipe: Any, call: Call) -> None:
    fast = optimized(pipe, CACHE).to("cpu")
    assert type(fast) is OptimizedPipeline
    call(fast)
    assert fast.last_run.computed == 4


def test_it_passes_for_the_pipelines_class(pipe: Any, call: Call) -> None:
    fast = optimized(pipe, CACHE)
    assert isinstance(fast, FluxPipeline)
    assert isinstance(fast, OptimizedPipeline)
    auto = AutoPipelineForImage2Image.from_pipe(fast)
    assert type(auto) is FluxImg2ImgPipeline
    assert auto.transformer is pipe.transformer


def test_it_cannot_be_pickled_and_says_why(pipe: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be pickled") as caught:
        pickle.dumps(optimized(pipe, CACHE))
    assert "in each process" in caught.value.fix


def test_a_lost_handle_is_no_loss(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    call(optimized(pipe, CACHE))
    with pytest.raises(AlreadyOptimizedError) as caught:
        hasten.optimize(pipe, "baseline")
    assert "hasten.restore(pipe)" in caught.value.fix
    assert hasten.restore(pipe) is pipe
    assert torch.equal(call(pipe), expected)
    assert hasten.restore(pipe) is pipe, "a plain pipeline stays as it is"
    fast = optimized(pipe, CACHE)
    assert hasten.restore(fast) is pipe


def test_an_owners_compilation_stays_inside_of_the_cache(
    make_pipe: Callable[[], Any], call: Call
) -> None:
    """Backend "eager": what could fail is Dynamo, tracing into the chain."""
    expected = call(optimized(make_pipe(), CACHE))

    def wrapped(pipe: Any) -> None:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")

    def in_place(pipe: Any) -> None:
        pipe.transformer.compile(backend="eager")

    for compiled in (wrapped, in_place):
        torch._dynamo.reset()
        pipe = make_pipe()
        compiled(pipe)
        plain = call(pipe)
        fast = optimized(pipe, CACHE)
        torch.testing.assert_close(call(fast), expected, rtol=1e-5, atol=1e-5)
        assert fast.last_run.computed == 4
        fast.restore()
        assert torch.equal(call(pipe), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("windows", [4, 6])
@torch.no_grad()
def test_windows_are_calls_of_one_step(windows: int, make_pipe: Callable[[], Any]) -> None:
    """As tiled pipelines do: any number of calls a step, none of which has a name."""

    def tiled(pipe: Any) -> torch.Tensor:
        embeds, pooled, ids = pipe.encode_prompt("a", None, max_sequence_length=8)
        generator = torch.Generator().manual_seed(0)
        latents, where = pipe.prepare_latents(1, 16, 32, 32, torch.float32, "cpu", generator)
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4), mu=0.5)
        for timestep in pipe.scheduler.timesteps:
            rest = (embeds, pooled, timestep.expand(1) / 1000, where, ids, torch.ones(1))
            shares = [
                pipe.transformer(latents.roll(k, 1), *rest).sample.roll(-k, 1)
                for k in range(windows)
            ]
            latents = pipe.scheduler.step(sum(shares) / windows, timestep, latents).prev_sample
        return latents

    expected = tiled(make_pipe())
    pipe = make_pipe()
    optimized(pipe, {"cache": {"interval": 1}})
    assert torch.equal(tiled(pipe), expected)


@pytest.mark.parametrize("sections", [TABLE, KERNELS], ids=["table", "kernels"])
def test_writes_under_inference_mode_are_noticed(
    sections: dict[str, Any], make_pipe: Callable[[], Any], call: Call
) -> None:
    def change(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            tensors["prompt_embeds"].add_(1.0)
        return {}

    arguments = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    with torch.inference_mode():
        expected = call(make_pipe(), **arguments).clone()
        assert close(call(optimized(make_pipe(), sections), **arguments), expected)


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [INT8, {"text": {"scheme": "int8-weight"}}], ids=str)
def test_codes_are_not_saved_as_weights(
    sections: dict[str, Any], pipe: Any, tmp_path: Path
) -> None:
    fast = optimized(pipe, sections)
    with pytest.raises(UnsupportedError, match="loaded as plain weights") as caught:
        fast.save_pretrained(tmp_path / "model")
    assert "before it is optimised" in caught.value.fix
    assert not (tmp_path / "model").exists()
    part = fast.transformer if sections is INT8 else fast.text_encoder_2
    with pytest.raises(UnsupportedError, match="loaded as plain weights"):
        part.save_pretrained(tmp_path / "part")


def test_adapters_for_codes_are_refused(pipe: Any) -> None:
    fast = optimized(pipe, INT8)
    with pytest.raises(UnsupportedError, match="an adapter cannot be added") as caught:
        fast.transformer.load_lora_adapter({}, prefix="transformer")
    assert "pipe.fuse_lora()" in caught.value.fix


def test_an_unquantised_pipeline_is_saved_with_its_defaults(
    saved_model: Path, tmp_path: Path, call: Call
) -> None:
    pipe = hasten.load_pipeline(str(saved_model), device="cpu", dtype="float32")
    names = set(pipe.transformer.state_dict())
    fast = optimized(pipe, {**TABLE, **CACHE})
    assert set(fast.transformer.state_dict()) == names
    expected = call(pipe)
    fast.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "hasten.json").read_text() == (
        saved_model / "hasten.json"
    ).read_text()
    again = optimized(
        hasten.load_pipeline(str(tmp_path / "model"), device="cpu", dtype="float32"),
        {**TABLE, **CACHE},
    )
    assert torch.equal(call(again), expected)


def test_what_cannot_be_undone_is_said_at_every_restore(pipe: Any) -> None:
    fast = optimized(pipe, INT8)
    for _ in range(2):
        with pytest.raises(HastenError, match="quantize cannot be undone"):
            fast.restore()


def test_a_second_pipeline_with_its_own_scheduler_runs_inside_a_callback(
    pipe: Any, call: Call
) -> None:
    fast = optimized(pipe, CACHE)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other = fast.from_pipe(FluxPipeline, scheduler=scheduler)
    alone, alone_other = call(fast, seed=1), call(other, seed=2)
    inner: list[torch.Tensor] = []

    def nested(*_: Any) -> dict[str, Any]:
        inner.append(call(other, seed=2))
        return {}

    assert torch.equal(call(fast, seed=1, callback_on_step_end=nested), alone)
    assert all(torch.equal(latents, alone_other) for latents in inner)


def test_a_budget_of_all_steps_is_said_to_skip_none(pipe: Any) -> None:
    fast = hasten.optimize(
        pipe, Recipe.from_dict({"sampling": {"steps": 3}, "cache": {"budget": 9}})
    )
    said = "no step is skipped: budget = 9 computes all 3 steps"
    assert said in fast.notes
    assert f"  note: {said}" in fast.summary()
    fast.restore()
    assert said not in fast.notes
