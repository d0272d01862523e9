"""CUDA graphs without a GPU: what is recorded when, for which calls, and what is not.

In place of a CUDA graph stands a trace of the same kernels over the same buffers: like a graph, it
holds whatever was no tensor as it was while recording.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import hasten
from hasten import CallError, HastenError, Recipe
from hasten.conflicts import conflicts, why_no_graphs
from hasten.step.graphs import MOST_GRAPHS, Graphs, Recording
from tests.passes.test_fuse import close

Call = Callable[..., torch.Tensor]

GRAPHS = {"mode": "none", "cuda_graphs": "auto"}
FORWARD = {"compile": GRAPHS}
KERNELS = {"fuse": {"kernels": "on"}, "compile": GRAPHS}
TABLE = {"fuse": {"kernels": "off"}, "compile": GRAPHS}
EVERY = pytest.mark.parametrize(
    "recipe", [FORWARD, KERNELS, TABLE], ids=["forward", "kernels", "table"]
)
ODD = {"joint_attention_kwargs": {"scale": 1.0, "note": object()}}  # ignored by the processors
CHANGES: list[dict[str, Any]] = [
    {"prompt": "a blue whale"},
    {"guidance_scale": 1.0},
    {"height": 48, "width": 64},
    {"prompt": ["a cat", "a dog"]},
    {"true_cfg_scale": 3.0, "negative_prompt": "blurry"},
    {"num_inference_steps": 3},
    {"max_sequence_length": 24},
    {"joint_attention_kwargs": {"scale": 0.5}},
]


class Replay:
    """A trace over buffers, run once more."""

    def __init__(
        self,
        function: Callable[..., tuple[torch.Tensor, ...]],
        buffers: tuple[torch.Tensor, ...],
        outputs: tuple[torch.Tensor, ...],
    ) -> None:
        self.trace = make_fx(function)(*buffers)
        self.buffers = buffers
        self.outputs = outputs

    def replay(self) -> None:
        with torch.no_grad():
            for output, value in zip(self.outputs, self.trace(*self.buffers), strict=True):
                output.copy_(value)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Recordings made, as they are made, on a CPU that passes for a GPU."""
    made: list[Any] = []

    def capture(graphs: Graphs, function: Any, inputs: Any, device: torch.device) -> Recording:
        buffers = tuple(value.clone() for value in inputs)
        outputs = tuple(output.clone() for output in function(*buffers))
        recording = Recording(Replay(function, buffers, outputs), buffers, outputs)
        made.append(recording)
        return recording

    monkeypatch.setattr(Graphs, "_capture", capture)
    for name in ("device", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: nullcontext())
    monkeypatch.setattr("hasten.check.why_no_graphs", lambda r, _: why_no_graphs(r, "cuda"))
    monkeypatch.setattr("hasten.check.conflicts", lambda recipe, _: conflicts(recipe, "cuda"))
    return made


def doubled(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x * 2,)


def test_one_recording_a_shape_dtype_and_key(captures: list[Any]) -> None:
    graphs = Graphs()
    wide, tall = torch.ones(1, 4), torch.ones(4, 1)
    for inputs, key in [(wide, None), (wide + 1, None), (tall, None), (wide.double(), None)]:
        assert torch.equal(graphs(doubled, [inputs], key)[0], inputs * 2)
    assert len(captures) == 3
    assert torch.equal(graphs(lambda x: (x * 3,), [wide], "other")[0], wide * 3)
    assert torch.equal(graphs(doubled, [wide])[0], wide * 2)
    assert len(captures) == 4


def test_an_answer_is_the_callers_own(captures: list[Any]) -> None:
    graphs = Graphs()
    (first,) = graphs(doubled, [torch.ones(3)])
    (second,) = graphs(doubled, [torch.full((3,), 5.0)])
    assert torch.equal(first, torch.full((3,), 2.0))
    assert torch.equal(second, torch.full((3,), 10.0))


def test_the_recording_used_longest_ago_goes_first(captures: list[Any]) -> None:
    graphs = Graphs()
    for size in range(1, MOST_GRAPHS + 1):
        graphs(doubled, [torch.ones(size)])
    graphs(doubled, [torch.ones(1)])  # in use again
    graphs(doubled, [torch.ones(100)])  # size 2 goes
    assert len(graphs.recorded) == MOST_GRAPHS
    made = len(captures)
    graphs(doubled, [torch.ones(1)])
    assert len(captures) == made
    graphs(doubled, [torch.ones(2)])
    assert len(captures) == made + 1


def test_what_was_recorded_under_inference_mode_is_used_outside_of_it(captures: list[Any]) -> None:
    graphs = Graphs()
    with torch.inference_mode():
        graphs(doubled, [torch.ones(2)])
    assert torch.equal(graphs(doubled, [torch.full((2,), 3.0)])[0], torch.full((2,), 6.0))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), RuntimeError("out of memory")],
    ids=["allocator", "driver"],
)
def test_out_of_memory_names_the_fix_and_leaves_nothing(
    error: RuntimeError, captures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = Graphs()
    graphs(doubled, [torch.ones(2)])
    works = Graphs._capture

    def full(*given: Any) -> Recording:
        raise error

    monkeypatch.setattr(Graphs, "_capture", full)
    with pytest.raises(HastenError, match="out of GPU memory while recording") as caught:
        graphs(doubled, [torch.ones(3)])
    assert "\n" not in caught.value.faults[0]
    assert 'cuda_graphs = "off"' in caught.value.fix
    assert not graphs.recorded
    monkeypatch.setattr(Graphs, "_capture", works)
    assert torch.equal(graphs(doubled, [torch.ones(2)])[0], torch.full((2,), 2.0))


def test_other_errors_are_not_taken_for_a_lack_of_memory(captures: list[Any]) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        Graphs()(broken, [torch.ones(1)])


@EVERY
def test_calls_are_those_without_graphs_whatever_changes(
    recipe: dict[str, Any], captures: list[Any], make_pipe: Callable[[], Any], call: Call
) -> None:
    plain, fast = make_pipe(), hasten.optimize(make_pipe(), Recipe.from_dict(recipe))
    for change in [{}, *CHANGES, {}]:
        assert close(call(fast, **change), call(plain, **change)), change
    made = len(captures)
    assert 0 < made <= MOST_GRAPHS
    for change in CHANGES[-2:]:
        call(fast, **change, seed=1)
    assert len(captures) == made, "the same shapes were recorded again"
    assert f"({made} recorded" in fast.summary()


def test_a_step_cache_decides_outside_of_the_graph(
    captures: list[Any], make_pipe: Callable[[], Any], call: Call
) -> None:
    cache = {"cache": {"interval": 2}}
    plain = hasten.optimize(make_pipe(), Recipe.from_dict(cache))
    fast = hasten.optimize(make_pipe(), Recipe.from_dict({**KERNELS, **cache}))
    assert close(call(fast), call(plain))
    assert fast.last_run.computed == plain.last_run.computed < 6
    assert len(captures) == 1


@EVERY
@torch.no_grad()
def test_both_kinds_of_answer(
    recipe: dict[str, Any], captures: list[Any], make_pipe: Callable[[], Any]
) -> None:
    expected = make_pipe().transformer(**inputs()).sample
    transformer = hasten.optimize(make_pipe(), Recipe.from_dict(recipe)).transformer
    assert close(transformer(**inputs()).sample, expected)
    (answer,) = transformer(**inputs(), return_dict=False)
    assert close(answer, expected)


@EVERY
@torch.no_grad()
def test_controlnet_residuals_are_inputs_of_a_graph(
    recipe: dict[str, Any], captures: list[Any], make_pipe: Callable[[], Any]
) -> None:
    control = {"controlnet_block_samples": [torch.randn(1, 4, 32)]}
    expected = make_pipe().transformer(**inputs(), **control).sample
    fast = hasten.optimize(make_pipe(), Recipe.from_dict(recipe))
    for _ in range(2):
        assert close(fast.transformer(**inputs(), **control).sample, expected)
    assert len(captures) == 1


@EVERY
@torch.no_grad()
def test_what_is_no_tensor_runs_without_a_graph_and_the_summary_says_so(
    recipe: dict[str, Any], captures: list[Any], make_pipe: Callable[[], Any]
) -> None:
    expected = make_pipe().transformer(**inputs()).sample
    fast = hasten.optimize(make_pipe(), Recipe.from_dict(recipe))
    assert close(fast.transformer(**inputs(), **ODD).sample, expected)
    assert not captures
    assert "calls with joint_attention_kwargs ran without" in fast.summary()


@EVERY
@torch.no_grad()
def test_who_insists_is_told(
    recipe: dict[str, Any], captures: list[Any], make_pipe: Callable[[], Any]
) -> None:
    on = {**recipe, "compile": {"mode": "none", "cuda_graphs": "on"}}
    fast = hasten.optimize(make_pipe(), Recipe.from_dict(on))
    fast.transformer(**inputs())
    assert len(captures) == 1
    with pytest.raises(CallError, match="CUDA graph cannot take") as caught:
        fast.transformer(**inputs(), **ODD)
    assert 'cuda_graphs = "auto"' in caught.value.fix
    fast.transformer._hf_peft_config_loaded = True
    with pytest.raises(CallError, match="unfused LoRA layers"):
        fast.transformer(**inputs())


@pytest.mark.parametrize("recipe", [FORWARD, TABLE], ids=["forward", "table"])
def test_lora_layers_are_not_recorded(
    recipe: dict[str, Any], captures: list[Any], pipe: Any, call: Call
) -> None:
    """Their scale is a number that changes from call to call: a graph would keep the first."""
    fast = hasten.optimize(pipe, Recipe.from_dict(recipe))
    pipe.transformer._hf_peft_config_loaded = True
    call(fast, num_inference_steps=2)
    assert not captures
    assert "calls with unfused LoRA layers ran without" in fast.summary()


@pytest.mark.parametrize("recipe", [FORWARD, TABLE], ids=["forward", "table"])
def test_weights_that_have_moved_are_recorded_again(
    recipe: dict[str, Any], captures: list[Any], pipe: Any, call: Call
) -> None:
    fast = hasten.optimize(pipe, Recipe.from_dict(recipe))
    expected = call(fast)
    call(fast)
    assert len(captures) == 1
    kept = [parameter.data for parameter in pipe.transformer.parameters()]
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(call(fast), expected)
    assert len(captures) == 2
    del kept


@EVERY
def test_restoring_leaves_the_plain_forward(
    recipe: dict[str, Any], captures: list[Any], pipe: Any, call: Call
) -> None:
    expected = call(pipe)
    fast = hasten.optimize(pipe, Recipe.from_dict(recipe))
    call(fast)
    fast.restore()
    assert "forward" not in pipe.transformer.__dict__
    assert "_reset_stateful_cache" not in pipe.transformer.__dict__
    made = len(captures)
    assert torch.equal(call(pipe), expected)
    assert len(captures) == made


def test_auto_declines_on_a_cpu_and_says_so(pipe: Any) -> None:
    summary = hasten.optimize(pipe, Recipe.from_dict(FORWARD)).summary()
    assert "cuda graphs: none" in summary
    assert "unchanged: the transformer's step: the pipeline is on cpu" in summary


def inputs() -> dict[str, torch.Tensor]:
    """A call of the small transformer outside of any run."""
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 64, generator=draw),
        "encoder_hidden_states": torch.randn(1, 3, 24, generator=draw),
        "pooled_projections": torch.randn(1, 16, generator=draw),
        "timestep": torch.tensor([0.123]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }


def test_a_computed_step_passes_few_files(captures: list[Any], pipe: Any, call: Call) -> None:
    """What a reader has to follow from the pipeline to the recorded kernels, as in `balanced`."""
    sections = {**KERNELS, "attention": {"backend": "auto"}, "cache": {"budget": 6}}
    fast = hasten.optimize(pipe, Recipe.from_dict(sections))
    call(fast)
    source = Path(hasten.__file__).parent
    files: set[str] = set()
    counting = False

    def look(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if counting and event == "call" and source in path.parents:
            files.add(str(path.relative_to(source)))

    def at_step_end(_: Any, step: int, *__: Any) -> dict[str, Any]:
        nonlocal counting
        counting = step == 2  # during the step that follows
        return {}

    sys.setprofile(look)
    try:
        call(fast, callback_on_step_end=at_step_end)
    finally:
        sys.setprofile(None)
    assert "step/chain.py" in files
    followed = {name for name in files if not name.startswith("kernels")}  # a graph runs those
    assert len(followed) <= 9, sorted(followed)
