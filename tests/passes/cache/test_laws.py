"""Laws of the step cache, on random plans and random calls of the small random pipeline.

Every computed step is exact, a call depends on its arguments alone, pipelines do not touch each
other, and no more is kept than the plan needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

import hasten
from hasten import Recipe
from hasten.models.random_weights import build_shape
from hasten.recipe import IntervalCache
from tests.conftest import SMALL
from tests.test_apply import peak_bytes

MOST_STEPS = 8
PREDICTORS = get_args(IntervalCache.model_fields["predictor"].annotation)
SLOPE = {"reuse": 0.0, "linear": 1.0, "damped": 0.5}
PROMPTS = ("a red fox", "two boats", "an old map of the moon")


def law(examples: int) -> Any:
    """The same examples on every run, few enough for a test."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On tensors this small, threads only wait for each other: ten times slower on a busy core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One pipeline for the whole module; every example leaves it as it was."""
    return build_shape(SMALL, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def twin() -> Any:
    """Another pipeline with the same weights."""
    return build_shape(SMALL, torch.device("cpu"), torch.float32)


@contextmanager
def optimized(pipe: Any, cache: dict[str, Any]) -> Iterator[Any]:
    """The pipeline under a recipe with this `[cache]`, restored behind the block."""
    fast = hasten.optimize(pipe, Recipe.from_dict({"cache": cache}))
    try:
        yield fast
    finally:
        fast.restore()


class BoomError(Exception):
    """Raised in the middle of a call."""


Kind = Literal["none", "callback raises", "transformer raises", "interrupted"]


@dataclass(frozen=True)
class Trouble:
    """What happens to a call at a step, counted from 0; nothing, where the call is too short."""

    kind: Kind = "none"
    step: int = 0


@dataclass(frozen=True)
class Call:
    """Arguments of one call; `images` a prompt."""

    steps: int
    width: int = 32
    height: int = 32
    prompts: int = 1
    images: int = 1
    first_prompt: int = 0
    seed: int = 0
    true_cfg: bool = False

    @property
    def branches(self) -> int:
        return 2 if self.true_cfg else 1

    @property
    def output_bytes(self) -> int:
        """One output of the transformer: a token for 16×16 pixels, 64 channels, float32."""
        return self.prompts * self.images * (self.width // 16) * (self.height // 16) * 64 * 4

    def on(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """The latents of this call of `pipe`."""
        chosen = [PROMPTS[(self.first_prompt + i) % len(PROMPTS)] for i in range(self.prompts)]
        arguments = {
            "prompt": chosen[0] if self.prompts == 1 else chosen,
            "num_images_per_prompt": self.images,
            "num_inference_steps": self.steps,
            "width": self.width,
            "height": self.height,
            "max_sequence_length": 8,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(self.seed),
        }
        if self.true_cfg:
            arguments |= {"true_cfg_scale": 2.5, "negative_prompt": ["blurry"] * self.prompts}
        return pipe(**arguments, **changes).images

    def tried_on(self, pipe: Any, trouble: Trouble) -> torch.Tensor | None:
        """The latents of this call, or None where the trouble ended it."""

        def at_step_end(pipe: Any, step: int, _time: Any, _latents: Any) -> dict[str, Any]:
            if step == trouble.step and trouble.kind == "callback raises":
                raise BoomError
            if step == trouble.step and trouble.kind == "interrupted":
                pipe._interrupt = True
            return {}

        passes = 0

        def in_transformer(*_: Any) -> None:
            nonlocal passes
            passes += 1
            if trouble.kind == "transformer raises" and passes > trouble.step:
                raise BoomError

        hook = pipe.transformer.norm_out.register_forward_hook(in_transformer)
        try:
            return self.on(pipe, callback_on_step_end=at_step_end)
        except BoomError:
            return None
        finally:
            hook.remove()


steps = st.integers(1, MOST_STEPS)
sides = st.sampled_from([16, 32, 48])
calls = st.builds(
    lambda batch, **rest: Call(prompts=batch[0], images=batch[1], **rest),
    steps=steps,
    width=sides,
    height=sides,
    batch=st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]),
    first_prompt=st.integers(0, len(PROMPTS) - 1),
    seed=st.integers(0, 3),
    true_cfg=st.booleans(),
)
troubles = st.builds(
    Trouble,
    kind=st.sampled_from(get_args(Kind)),
    step=st.integers(0, MOST_STEPS - 1),
)
predictors = st.sampled_from(PREDICTORS)
intervals = st.builds(
    lambda start, interval, tail, predictor: {
        "start_step": start,
        "interval": interval,
        "predictor": predictor,
        **({} if tail is None else {"end_step": max(1, start + tail)}),
    },
    start=st.integers(0, 3),
    interval=st.integers(1, 4),
    tail=st.none() | st.integers(0, 6),
    predictor=predictors,
)
budgets = st.builds(lambda budget: {"budget": budget}, st.integers(1, MOST_STEPS))


@st.composite
def schedules(draw: Any, *, weighted: bool | None = None) -> dict[str, Any]:
    """A random subset of the steps, the first one in it; its gaps filled by a predictor or by
    random weights."""
    count = draw(st.integers(1, MOST_STEPS))
    chosen = draw(st.lists(st.booleans(), min_size=count - 1, max_size=count - 1))
    compute = [0, *(step for step, computed in enumerate(chosen, 1) if computed)]
    cache: dict[str, Any] = {"kind": "schedule", "steps": count, "compute": compute}
    if weighted is None:
        weighted = draw(st.booleans())
    if weighted:
        row = st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=4)
        cache["weights"] = [draw(row) for _ in compute]
    else:
        cache["predictor"] = draw(predictors)
    return cache


residuals = st.builds(
    lambda **values: {"kind": "residual", **values},
    threshold=st.sampled_from([0.001, 0.05, 0.2, 10.0]),
    warmup_steps=st.integers(1, MOST_STEPS),
    max_consecutive=st.integers(1, MOST_STEPS),
    first_blocks=st.integers(1, 3),
    predictor=predictors,
)
caches = intervals | schedules() | budgets | residuals


def planned(cache: dict[str, Any], count: int) -> int | None:
    """How many of `count` steps a whole run under this cache computes; None if the run decides."""
    if cache.get("kind") == "residual":
        return None
    if "budget" in cache:
        return min(cache["budget"], count)
    if "compute" in cache:
        share = len(cache["compute"]) / cache["steps"]
        return max(1, min(count, round(share * count)))
    start, end = cache["start_step"], cache.get("end_step", count)
    return sum(
        step < start or step >= end or (step - start) % cache["interval"] == 0
        for step in range(count)
    )


def every_step(count: int) -> st.SearchStrategy[dict[str, Any]]:
    """Caches of every kind that skip none of `count` steps."""
    whole = st.builds(
        lambda learned, predictor: {
            "kind": "schedule",
            "steps": learned,
            "compute": list(range(learned)),
            "predictor": predictor,
        },
        learned=st.just(count) | steps,
        predictor=predictors,
    )
    return st.one_of(
        intervals.map(lambda cache: {**cache, "interval": 1}),
        intervals.map(lambda cache: {**cache, "start_step": 0, "end_step": 1}),
        intervals.map(lambda cache: {**cache, "start_step": count, "end_step": None}),
        whole,
        whole.map(lambda cache: {**cache, "weights": [[1.0]] * cache["steps"]}),
        st.integers(count, 2 * MOST_STEPS).map(lambda budget: {"budget": budget}),
        residuals.map(lambda cache: {**cache, "warmup_steps": count}),
    )


@law(80)
@given(data=st.data(), call=calls)
def test_a_plan_that_skips_nothing_is_the_plain_pipeline(pipe: Any, data: Any, call: Call) -> None:
    expected = call.on(pipe)
    with optimized(pipe, data.draw(every_step(call.steps))) as fast:
        assert torch.equal(call.on(fast), expected)
        run = fast.last_run
        assert (run.steps, run.computed, run.skipped) == (call.steps, call.steps, 0)
        assert run.stored == call.branches * call.steps


@law(50)
@given(
    cache=caches,
    sequence=st.lists(st.tuples(calls, troubles, st.booleans()), min_size=2, max_size=5),
)
@example(  # broken off at once, then other noise levels in as many steps
    cache={"start_step": 2, "interval": 3, "predictor": "linear"},
    sequence=[
        (Call(6, 16, 16), Trouble("transformer raises", 0), True),
        (Call(6, 48, 48), Trouble(), True),
    ],
)
def test_a_call_depends_on_its_arguments_alone(
    pipe: Any, twin: Any, cache: dict[str, Any], sequence: list[tuple[Call, Trouble, bool]]
) -> None:
    """Whatever was called before, broken off or interrupted, through `fast` or underneath it."""
    with optimized(pipe, cache) as fast:
        for call, trouble, underneath in sequence:
            with optimized(twin, cache) as fresh:
                expected = call.tried_on(fresh, trouble)
                expected_run = fresh.last_run
            before = fast.last_run
            got = call.tried_on(fast.pipe if underneath else fast, trouble)
            assert (got is None) == (expected is None)
            if got is not None:
                assert torch.equal(got, expected)
            if underneath:
                continue
            assert not fast.held_bytes
            assert fast.last_run == (before if got is None else expected_run)
            if got is not None and (trouble.kind != "interrupted" or trouble.step >= call.steps):
                run, computed = fast.last_run, planned(cache, call.steps)
                assert run.steps == call.steps
                assert computed is None or run.computed == computed
                assert computed is None or run.stored == computed * call.branches


def test_an_interrupted_call_entered_no_more_steps(pipe: Any) -> None:
    with optimized(pipe, {"start_step": 1, "interval": 2}) as fast:
        for step in range(6):
            assert Call(6).tried_on(fast, Trouble("interrupted", step)) is not None
            assert (fast.last_run.steps, fast.last_run.computed) == (step + 1, 1 + (step + 1) // 2)


def interleaved(
    outer: Any, call: Call, inner: Any, plan: dict[int, tuple[Call, Trouble]]
) -> tuple[torch.Tensor, dict[int, torch.Tensor | None]]:
    """`call` of `outer`, and after its steps in `plan` other calls of `inner`; what each gives."""
    found: dict[int, torch.Tensor | None] = {}

    def nested(_pipe: Any, step: int, _time: Any, _latents: Any) -> dict[str, Any]:
        if step in plan:
            other, trouble = plan[step]
            found[step] = other.tried_on(inner, trouble)
        return {}

    return call.on(outer, callback_on_step_end=nested), found


@pytest.mark.parametrize("shared", [False, True], ids=["own transformers", "one transformer"])
@law(30)
@given(
    caches=st.tuples(caches, caches),
    call=calls,
    plan=st.dictionaries(
        st.integers(0, MOST_STEPS - 1), st.tuples(calls, troubles), min_size=1, max_size=3
    ),
    outer_is_twin=st.booleans(),
)
def test_interleaved_pipelines_give_what_each_gives_alone(
    pipe: Any,
    twin: Any,
    shared: bool,
    caches: tuple[dict[str, Any], dict[str, Any]],
    call: Call,
    plan: dict[int, tuple[Call, Trouble]],
    outer_is_twin: bool,
) -> None:
    with optimized(pipe, caches[0]) as one, optimized(twin, caches[1]) as own:
        pair = [one, from_pipe_of(one) if shared else own]
        outer, inner = reversed(pair) if outer_is_twin else pair
        expected = call.on(outer)
        expected_run = outer.last_run
        expected_inner = {
            step: other.tried_on(inner, trouble)
            for step, (other, trouble) in plan.items()
            if step < call.steps
        }
        got, got_inner = interleaved(outer, call, inner, plan)
        assert torch.equal(got, expected)
        assert outer.last_run == expected_run
        assert got_inner.keys() == expected_inner.keys()
        for step, latents in got_inner.items():
            if latents is None or expected_inner[step] is None:
                assert latents is expected_inner[step] is None
            else:
                assert torch.equal(latents, expected_inner[step])
        assert not one.held_bytes
        assert not own.held_bytes


def from_pipe_of(fast: Any) -> Any:
    """Another pipeline over the same transformer, with a scheduler of its own."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(fast.scheduler.config)
    return fast.from_pipe(FluxPipeline, scheduler=scheduler)


class Watch:
    """Outputs that the transformer computed, velocities that its caller got, and how many bytes of
    the former were alive at most when a step ended."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []
        self.velocities: list[torch.Tensor] = []
        self.storages: list[tuple[StorageWeakRef, int]] = []
        self.most_bytes = 0

    def bytes_alive(self) -> int:
        return sum(size for reference, size in self.storages if not reference.expired())

    def at_step_end(self, *_: Any) -> dict[str, Any]:
        self.most_bytes = max(self.most_bytes, self.bytes_alive())
        return {}

    @contextmanager
    def over(self, transformer: Any) -> Iterator[Watch]:
        def computed(_module: Any, _arguments: Any, output: torch.Tensor) -> None:
            storage = output.untyped_storage()
            self.storages.append((StorageWeakRef(storage), storage.nbytes()))
            self.outputs.append(output.clone())

        def returned(_module: Any, _arguments: Any, output: Any) -> None:
            self.velocities.append(output[0].clone())

        hooks = [
            transformer.proj_out.register_forward_hook(computed),
            transformer.register_forward_hook(returned),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()


def megabytes_in(summary: str) -> float:
    found = re.search(r"held at most ([\d.]+) MiB of outputs", summary)
    assert found is not None, summary
    return float(found[1])


big_calls = st.builds(
    Call,
    steps=steps,
    width=st.sampled_from([128, 192]),
    height=st.sampled_from([128, 256]),
    images=st.integers(1, 2),
    true_cfg=st.booleans(),
)


@law(50)
@given(cache=schedules(), call=big_calls)
def test_no_more_is_kept_than_the_plan_needs(pipe: Any, cache: dict[str, Any], call: Call) -> None:
    """And the summary tells the number of bytes that were really alive."""
    history = 1 if cache.get("predictor") == "reuse" else 2
    if "weights" in cache and call.steps == cache["steps"]:  # elsewhere a predictor replaces them
        history = max(map(len, cache["weights"]))
    watch = Watch()
    with optimized(pipe, cache) as fast, watch.over(pipe.transformer):
        call.on(fast, callback_on_step_end=watch.at_step_end)
        assert watch.bytes_alive() == 0, "outputs outlive their run"
        assert peak_bytes(fast) == watch.most_bytes
        assert watch.most_bytes <= history * call.output_bytes * call.branches
        assert watch.most_bytes % (call.output_bytes * call.branches) == 0
        assert megabytes_in(fast.summary()) == pytest.approx(watch.most_bytes / 2**20, abs=0.0051)


@law(50)
@given(data=st.data(), cache=schedules(weighted=True), true_cfg=st.booleans())
def test_a_velocity_is_the_weighted_sum_of_the_newest_outputs(
    pipe: Any, data: Any, cache: dict[str, Any], true_cfg: bool
) -> None:
    """Of its own branch; where fewer are known than there are weights, the newest one itself."""
    call = Call(cache["steps"], seed=data.draw(st.integers(0, 3)), true_cfg=true_cfg)
    watch = Watch()
    with optimized(pipe, cache) as fast, watch.over(pipe.transformer):
        call.on(fast)
    for branch in range(call.branches):
        outputs = watch.outputs[branch :: call.branches]
        velocities = watch.velocities[branch :: call.branches]
        assert (len(outputs), len(velocities)) == (len(cache["compute"]), call.steps)
        for step, velocity in enumerate(velocities):
            known = sum(computed <= step for computed in cache["compute"])
            newest_first = outputs[:known][::-1]
            row = cache["weights"][known - 1]
            row = row if len(row) <= known else [1.0]
            expected = sum(w * v.double() for w, v in zip(row, newest_first, strict=False))
            torch.testing.assert_close(velocity.double(), expected, rtol=1e-5, atol=1e-5)


@law(100)
@given(
    cache=budgets | intervals | schedules(weighted=False),
    count=st.integers(5, MOST_STEPS),
    skipped=st.integers(0, 4),
)
def test_a_late_start_is_planned_from_the_noise_it_has(
    pipe: Any, cache: dict[str, Any], count: int, skipped: int
) -> None:
    """Its first step is computed, and what stands in is taken at its own noise levels."""
    entered = count - skipped
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    picture: dict[str, Any] = {"image": Image.fromarray(pixels), "strength": entered / count}
    known: list[int] = []  # after each step: how many outputs have been computed
    watch = Watch()

    def at_step_end(*_: Any) -> dict[str, Any]:
        known.append(len(watch.outputs))
        return {}

    with optimized(pipe, cache) as fast, watch.over(pipe.transformer):
        late = fast.from_pipe(FluxImg2ImgPipeline)
        Call(count).on(late, **picture, callback_on_step_end=at_step_end)
        sigmas = late.scheduler.sigmas.tolist()[-entered - 1 :]
    assert known[0] == 1
    assert (late.last_run.steps, late.last_run.computed) == (len(known), known[-1])
    assert len(known) == entered
    if "compute" not in cache:
        assert known[-1] == planned(cache, entered)
    if cache.get("predictor") in SLOPE:
        for step, velocity in enumerate(watch.velocities):
            at = [sigmas[known.index(number + 1)] for number in range(known[step])]
            expected = stood_in(cache["predictor"], at, watch.outputs, sigmas[step])
            torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)


def stood_in(
    predictor: str, sigmas: list[float], outputs: list[torch.Tensor], sigma: float
) -> torch.Tensor:
    """The newest of the outputs known at `sigmas`, and from there as much of the line through the
    two newest as the predictor follows."""
    newest = outputs[len(sigmas) - 1]
    if predictor == "reuse" or len(sigmas) < 2:
        return newest
    slope = (newest - outputs[len(sigmas) - 2]) / (sigmas[-1] - sigmas[-2])
    return newest + SLOPE[predictor] * slope * (sigma - sigmas[-1])


@law(30)
@given(call=calls, budget=st.integers(1, 2 * MOST_STEPS))
def test_a_budget_is_what_a_run_computes(pipe: Any, call: Call, budget: int) -> None:
    passes: list[int] = []
    hook: Callable[..., None] = lambda *_: passes.append(1)  # noqa: E731
    with optimized(pipe, {"budget": budget}) as fast:
        handle = pipe.transformer.norm_out.register_forward_hook(hook)
        call.on(fast)
        handle.remove()
        computed = min(budget, call.steps)
        assert len(passes) == computed * call.branches
        assert (fast.last_run.steps, fast.last_run.computed) == (call.steps, computed)
