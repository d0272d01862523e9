"""The residual policy: which steps it skips, what stands in on them, and that computing every step
is the plain pipeline, however the pipeline is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters

import hasten
from hasten import Recipe
from hasten.check import check
from hasten.errors import UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.machine import machine
from hasten.models.random_weights import build_shape
from hasten.passes.cache.residual import ResidualPolicy, relative_change
from hasten.recipe import ResidualCache
from hasten.step.block_hooks import BlockHooks
from hasten.step.call import Output, StepCall
from hasten.step.chain import _context
from hasten.step.run import Run
from tests.conftest import SMALL
from tests.passes.test_compile import GRAPHS
from tests.test_apply import ARGUMENTS, fresh, peak_bytes, same

Call = Callable[..., torch.Tensor]

EVERY_STEP = {"kind": "residual", "threshold": 1e-12, "warmup_steps": 1}
# On random weights the first block's residual changes by 0.6 to 1 from step to step.
SPARSE = {"kind": "residual", "threshold": 0.9, "warmup_steps": 2, "max_consecutive": 2}
LINEAR = {**SPARSE, "predictor": "linear"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One pipeline for the whole module; every test leaves it as it was."""
    return build_shape(SMALL, torch.device("cpu"), torch.float32)


@contextmanager
def optimized(pipe: Any, cache: dict[str, Any], **sections: Any) -> Iterator[Any]:
    """The pipeline under a recipe with this `[cache]`, restored behind the block."""
    fast = hasten.optimize(pipe, Recipe.from_dict({"cache": cache, **sections}))
    try:
        yield fast
    finally:
        fast.restore()


# --- one branch, on a model of two blocks ---------------------------------------------------------


class Adds(nn.Module):
    """A block that adds its tensor to the tokens, and that can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.added = torch.zeros(0)
        self.fails = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("out of memory")
        return hidden_states + self.added


class TwoBlocks:
    """A model of two blocks over zeros, and one branch of the policy before it."""

    def __init__(self, sigmas: Sequence[float], **cache: Any) -> None:
        self.blocks = Adds(), Adds()
        hooks = BlockHooks([(block, ("hidden_states",)) for block in self.blocks])
        policy = ResidualPolicy(ResidualCache(**cache), hooks, ("hidden_states",))
        self.branch = policy.begin(sigmas)()
        scheduler = SimpleNamespace(timesteps=torch.arange(len(sigmas)))
        self.run = Run(scheduler, begin=0)  # type: ignore[arg-type]

    def __call__(self, step: int, first: torch.Tensor, rest: torch.Tensor) -> Output:
        self.blocks[0].added, self.blocks[1].added = first, rest
        call = StepCall({"hidden_states": torch.zeros_like(first)}, self.run, step, "branch")
        return self.branch.output_of(call, self._forward)

    def _forward(self, call: StepCall) -> Output:
        tokens = call.latents
        for block in self.blocks:
            tokens = block(tokens)
        return Output.of((tokens,))


def branch_of(sigmas: Sequence[float], **cache: Any) -> TwoBlocks:
    return TwoBlocks(sigmas, **cache)


def tokens(*levels: float) -> torch.Tensor:
    """B×2×3, each item filled with its level."""
    return torch.tensor(levels, dtype=torch.float64).view(-1, 1, 1).expand(-1, 2, 3)


def computed_of(branch: TwoBlocks, firsts: Sequence[torch.Tensor]) -> list[bool]:
    return [
        branch(step, first, torch.ones_like(first)).computed for step, first in enumerate(firsts)
    ]


def test_a_step_is_compared_with_the_last_computed_one() -> None:
    """Slow drift: each step is near the one before, and ever farther from the reference."""
    branch = branch_of([1.0] * 9, threshold=0.25, warmup_steps=1, max_consecutive=1000)
    drift = [tokens(1 + step / 10) for step in range(8)]
    # |1.3 - 1| / 1 is the first over 0.25; from there |1.7 - 1.3| / 1.3.
    assert computed_of(branch, drift) == [True, False, False, True, False, False, False, True]


def test_every_image_of_a_batch_has_to_qualify() -> None:
    still, moved = tokens(1, 1), tokens(1, 1.3)
    assert relative_change(moved, still).tolist() == pytest.approx([0, 0.3])
    assert relative_change(moved, still).mean() < 0.2
    assert computed_of(branch_of([1.0] * 3, threshold=0.2, warmup_steps=1), [still, moved]) == [
        True,
        True,
    ]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 0.0])
def test_what_cannot_be_compared_is_computed(odd: float) -> None:
    branch = branch_of([1.0] * 4, threshold=1e9, warmup_steps=1)
    assert computed_of(branch, [tokens(odd), tokens(1)]) == [True, True]
    if odd:
        assert computed_of(branch, [tokens(1), tokens(odd)])[1]


@given(warmup=st.integers(1, 6), most=st.integers(1, 6), steps=st.integers(1, 20))
def test_a_still_picture_is_computed_as_seldom_as_allowed(
    warmup: int, most: int, steps: int
) -> None:
    branch = branch_of([1.0] * (steps + 1), warmup_steps=warmup, max_consecutive=most)
    computed = computed_of(branch, [tokens(1)] * steps)
    assert computed == [
        step < warmup or (step - warmup) % (most + 1) == most for step in range(steps)
    ]


@given(slope=st.floats(-3, 3), level=st.floats(-3, 3), steps=st.integers(3, 9))
def test_linear_is_exact_where_the_rest_moves_on_a_line(
    slope: float, level: float, steps: int
) -> None:
    sigmas = [1 - (step / steps) ** 2 for step in range(steps + 1)]
    branch = branch_of(sigmas, warmup_steps=2, predictor="linear", max_consecutive=1000)
    for step in range(steps):
        first, rest = tokens(1 + step / 1000), tokens(level + slope * sigmas[step])
        output = branch(step, first, rest)
        assert output.computed == (step < 2)
        torch.testing.assert_close(output.tensors[0], first + rest, rtol=0, atol=2e-5 * steps**2)


def test_a_call_that_fails_changes_nothing() -> None:
    branch = branch_of([1.0] * 9, threshold=0.1, warmup_steps=1)
    computed_of(branch, [tokens(1), tokens(1)])
    before = [kept.clone() for kept in branch.branch.kept()]
    branch.blocks[1].fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        branch(2, tokens(2), tokens(2))
    assert branch.branch.skipped == 1
    assert all(map(torch.equal, branch.branch.kept(), before))


# --- the whole pipeline ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_step_computed_is_bit_equal_to_the_plain_pipeline(
    name: str, pipe: Any, call: Call
) -> None:
    expected = call(pipe, **fresh(ARGUMENTS[name]))
    for first_blocks in (1, 3):
        with optimized(pipe, {**EVERY_STEP, "first_blocks": first_blocks}) as fast:
            assert same(call(fast, **fresh(ARGUMENTS[name])), expected)
            branches = 2 if name == "true cfg" else 1
            assert fast.last_run.steps == fast.last_run.computed == fast.last_run.stored / branches
            assert same(call(fast, **fresh(ARGUMENTS[name])), expected), "the second call differs"
    assert same(call(pipe, **fresh(ARGUMENTS[name])), expected), "restore() left something behind"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_calls_depend_on_their_arguments_alone(name: str, pipe: Any, call: Call) -> None:
    with optimized(pipe, LINEAR) as fast:
        first = call(fast, **fresh(ARGUMENTS[name]))
        for other in ("batch", "other size", "true cfg"):
            call(fast, **fresh(ARGUMENTS[other]), seed=1)
        assert same(call(fast, **fresh(ARGUMENTS[name])), first)
        assert same(call(pipe, **fresh(ARGUMENTS[name])), first), "called on the pipeline itself"
        assert not fast.held_bytes


class Seen:
    """What flows through a plain forward, by hooks on the original modules."""

    def __init__(self, transformer: Any, first_blocks: int) -> None:
        self.values: dict[str, torch.Tensor] = {}
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        watched = {
            "start": transformer.x_embedder,
            "conditioning": transformer.time_text_embed,
            "first": blocks[first_blocks - 1],
            "end": blocks[-1],
        }
        self.hooks = [
            module.register_forward_hook(lambda _m, _a, output, name=name: self.keep(name, output))
            for name, module in watched.items()
        ]

    def keep(self, name: str, output: Any) -> None:
        self.values[name] = output[1] if isinstance(output, tuple) else output

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def reference_sampler(
    pipe: Any, cache: ResidualCache, steps: int, prompts: list[str]
) -> tuple[torch.Tensor, list[int]]:
    """The policy written out as a sampling loop over whole forward passes: latents, and the steps
    it would have computed."""
    embeds, pooled, text_ids = pipe.encode_prompt(prompts, None, max_sequence_length=8)
    batch = len(prompts)
    generator = torch.Generator().manual_seed(0)
    latents, ids = pipe.prepare_latents(batch, 16, 32, 32, torch.float32, "cpu", generator)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    shift = 0.5 + (1.15 - 0.5) / (4096 - 256) * (latents.shape[1] - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
    transformer, seen = pipe.transformer, Seen(pipe.transformer, cache.first_blocks)
    computed: list[int] = []
    residual = torch.zeros(0)
    rests: list[tuple[float, torch.Tensor]] = []
    for step, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[step])
        velocity = transformer(
            hidden_states=latents,
            timestep=timestep.expand(batch) / 1000,
            guidance=torch.full([batch], 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
        )[0]
        start, first, end = (seen.values[name] for name in ("start", "first", "end"))
        skips = step >= cache.warmup_steps and step - computed[-1] <= cache.max_consecutive
        for item in range(batch if skips else 0):
            change = (first - start - residual)[item].abs().mean() / residual[item].abs().mean()
            skips = skips and float(change) < cache.threshold
        if skips:
            rest = rests[-1][1]
            if cache.predictor == "linear" and len(rests) > 1:
                (s0, r0), (s1, r1) = rests[-2:]
                rest = r1 + (r1 - r0) / (s1 - s0) * (sigma - s1)
            conditioned = transformer.norm_out(first + rest, seen.values["conditioning"])
            velocity = transformer.proj_out(conditioned)
        else:
            computed.append(step)
            residual = first - start
            rests.append((sigma, end - first))
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    seen.close()
    return latents, computed


def steps_run_by(fast: Any, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """The latents of a call, and the steps on which the last block ran."""
    steps: set[int] = set()
    scheduler = fast.pipe.scheduler
    hook = fast.transformer.single_transformer_blocks[-1].register_forward_hook(
        lambda *_: steps.add(scheduler.step_index or 0)
    )
    try:
        return call(), sorted(steps)
    finally:
        hook.remove()


@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(
    threshold=st.floats(0.4, 1.2),
    warmup=st.integers(1, 4),
    most=st.integers(1, 5),
    first_blocks=st.integers(1, 3),
    predictor=st.sampled_from(["reuse", "linear"]),
    steps=st.integers(2, 9),
    batch=st.integers(1, 2),
)
def test_a_run_is_the_sampler_it_claims_to_be(
    pipe: Any,
    threshold: float,
    warmup: int,
    most: int,
    first_blocks: int,
    predictor: str,
    steps: int,
    batch: int,
) -> None:
    cache = {
        "kind": "residual",
        "threshold": threshold,
        "warmup_steps": warmup,
        "max_consecutive": most,
        "first_blocks": first_blocks,
        "predictor": predictor,
    }
    prompts = ["a red fox", "two boats"][:batch]
    policy = ResidualCache.model_validate(cache)
    with torch.no_grad():
        expected, computed = reference_sampler(pipe, policy, steps, prompts)
    with optimized(pipe, cache) as fast:
        latents, really_computed = steps_run_by(
            fast,
            lambda: (
                fast(
                    prompts,
                    num_inference_steps=steps,
                    height=32,
                    width=32,
                    guidance_scale=3.5,
                    max_sequence_length=8,
                    output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                ).images
            ),
        )
        assert really_computed == computed
        assert fast.last_run.computed == len(computed)
        assert fast.last_run.steps == steps
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_the_thresholds_of_these_tests_skip_some_steps_and_not_others(
    pipe: Any, call: Call
) -> None:
    with optimized(pipe, SPARSE) as fast:
        call(fast, num_inference_steps=9)
        assert 2 < fast.last_run.computed < 9
        run = fast.last_run
        assert f"{run.computed} of 9 steps computed" in fast.summary()


def test_guidance_branches_decide_on_their_own(pipe: Any, call: Call) -> None:
    ran: dict[str, list[bool]] = {"cond": [], "uncond": []}
    with optimized(pipe, {**SPARSE, "max_consecutive": 1000}) as fast:
        transformer = fast.transformer
        hooks = [
            transformer.x_embedder.register_forward_hook(
                lambda *_: ran[str(_context.get())].append(False)
            ),
            transformer.single_transformer_blocks[-1].register_forward_hook(
                lambda *_: ran[str(_context.get())].__setitem__(-1, True)
            ),
        ]
        call(fast, num_inference_steps=9, true_cfg_scale=3.0, negative_prompt="blurry")
        for hook in hooks:
            hook.remove()
        assert len(ran["cond"]) == len(ran["uncond"]) == 9
        assert ran["cond"] != ran["uncond"]
        assert fast.last_run.stored == sum(ran["cond"]) + sum(ran["uncond"])
        either = [a or b for a, b in zip(ran["cond"], ran["uncond"], strict=True)]
        assert fast.last_run.computed == sum(either)


class BoomError(Exception):
    pass


def test_an_exception_in_mid_run_leaves_no_state(pipe: Any, call: Call) -> None:
    def explode(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise BoomError
        return {}

    with optimized(pipe, LINEAR) as fast:
        expected = call(fast)
        for victim in (fast, pipe):
            with pytest.raises(BoomError):
                call(victim, seed=5, callback_on_step_end=explode)
            assert torch.equal(call(victim), expected)
        assert not fast.held_bytes


def test_pipelines_interleave(pipe: Any, make_pipe: Callable[[], Any], call: Call) -> None:
    """One over the same transformer, one over its own; both run whole inside every step."""
    with optimized(pipe, SPARSE) as fast, optimized(make_pipe(), LINEAR) as stranger:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        twin = fast.from_pipe(FluxPipeline, scheduler=scheduler)
        others = [(twin, {"seed": 2, "num_inference_steps": 9}), (stranger, {"seed": 3})]
        alone = call(fast, seed=1)
        expected = [call(other, **arguments) for other, arguments in others]
        inner = []

        def nested(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            inner.append([call(other, **arguments) for other, arguments in others])
            return {}

        assert torch.equal(call(fast, seed=1, callback_on_step_end=nested), alone)
        assert len(inner) == 6
        assert all(same(got, expected) for got in inner)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image_warms_up_from_its_own_first_step(
    pipe: Any, call: Call, strength: float
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    arguments = {"image": image, "strength": strength, "num_inference_steps": 9}
    expected = call(FluxImg2ImgPipeline.from_pipe(pipe), **arguments)
    steps = 9 - int(9 - 9 * strength)
    with optimized(pipe, EVERY_STEP) as fast:
        assert torch.equal(call(fast.from_pipe(FluxImg2ImgPipeline), **arguments), expected)
    still = {"kind": "residual", "threshold": 1e9, "warmup_steps": 2, "max_consecutive": 1000}
    with optimized(pipe, still) as fast:
        twin = fast.from_pipe(FluxImg2ImgPipeline)
        first = call(twin, **arguments)
        assert (twin.last_run.steps, twin.last_run.computed) == (steps, 2)
        assert torch.equal(call(twin, **arguments), first)


def test_a_copy_leaves_the_original_alone(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = hasten.optimize(pipe, Recipe.from_dict({"cache": LINEAR}), copy=True)
    cached = call(fast)
    assert not torch.equal(cached, expected)
    assert torch.equal(call(pipe), expected)
    assert torch.equal(call(fast), cached)


@pytest.mark.parametrize(("predictor", "kept"), [("reuse", 2), ("linear", 3)])
def test_held_memory_is_counted(pipe: Any, call: Call, predictor: str, kept: int) -> None:
    with optimized(pipe, {**SPARSE, "predictor": predictor}) as fast:
        call(fast, height=512, width=512, num_inference_steps=3)
        one_residual = 1024 * pipe.transformer.inner_dim * 4  # tokens × channels, float32
        assert peak_bytes(fast) == kept * one_residual
        assert f"held at most {kept * one_residual / 2**20:.2f} MiB of residuals" in fast.summary()
        call(fast, true_cfg_scale=2.0, negative_prompt="x", height=512, width=512)
        assert peak_bytes(fast) == 2 * kept * one_residual


def test_the_summary_says_what_is_decided_and_what_that_costs(pipe: Any) -> None:
    with optimized(pipe, {"kind": "residual", "threshold": 0.25, "first_blocks": 2}) as fast:
        for words in (
            "0.25",
            "first 2 blocks",
            "first 4 steps",
            "4 consecutive steps",
            "waits for the",
        ):
            assert words in fast.summary()
        assert fast.calibrated is None
    with optimized(pipe, {"kind": "residual", "max_consecutive": 1000}) as fast:
        assert "consecutive" not in fast.summary()


# --- odd calls of the transformer -----------------------------------------------------------------


def transformer_loop(pipe: Any, **extra: Any) -> torch.Tensor:
    """A sampling loop of one's own over the pipeline's scheduler, with positional arguments."""
    embeds, pooled, text_ids = pipe.encode_prompt("a", None, max_sequence_length=8)
    generator = torch.Generator().manual_seed(0)
    latents, ids = pipe.prepare_latents(1, 16, 32, 32, torch.float32, "cpu", generator)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5), mu=0.5)
    for timestep in pipe.scheduler.timesteps:
        where = (timestep.expand(1) / 1000, ids, text_ids)
        output = pipe.transformer(latents, embeds, pooled, *where, torch.ones(1), **extra)
        latents = pipe.scheduler.step(output.sample, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def test_controlnet_residuals_and_positional_arguments_are_passed_on(pipe: Any) -> None:
    torch.manual_seed(0)
    controls = [torch.randn(1, 4, pipe.transformer.inner_dim) for _ in range(2)]
    for extra in (
        {},
        {"controlnet_block_samples": controls},
        {"controlnet_block_samples": controls[:1], "controlnet_single_block_samples": controls},
        {"controlnet_block_samples": controls, "controlnet_blocks_repeat": True},
    ):
        expected = transformer_loop(pipe, **extra)
        with optimized(pipe, EVERY_STEP):
            assert torch.equal(transformer_loop(pipe, **extra), expected)
        with optimized(pipe, LINEAR):
            assert not torch.equal(transformer_loop(pipe, **extra), expected)


def test_offloading_hooks_around_it_change_nothing(pipe: Any, call: Call) -> None:
    """What model offloading does to the transformer, on the device it is on already."""
    with optimized(pipe, SPARSE) as fast:
        expected = call(fast)
        add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="cpu"))
        assert torch.equal(call(fast), expected)
        remove_hook_from_module(pipe.transformer)
        assert torch.equal(call(fast), expected)


# --- what is refused ------------------------------------------------------------------------------


class Capable:
    """A machine on which every compilation works."""

    def compile_problem(self, device_type: str) -> None:
        return None


def refusal(pipe: Any, recipe: dict[str, Any]) -> UnsupportedError:
    with pytest.raises(UnsupportedError) as caught:
        check(Recipe.from_dict(recipe), pipe, FLUX1, Capable())  # type: ignore[arg-type]
    return caught.value


def test_one_graph_leaves_no_room_for_a_decision(pipe: Any) -> None:
    error = refusal(pipe, {"cache": EVERY_STEP, "compile": {"mode": "full"}})
    assert "between the blocks" in error.faults[0]
    assert 'set compile.mode = "blocks"' in error.fix
    blocks = Recipe.from_dict({"cache": EVERY_STEP, "compile": {"mode": "blocks"}})
    check(blocks, pipe, FLUX1, Capable())  # type: ignore[arg-type]


@pytest.mark.parametrize("first_blocks", [4, 9])
def test_some_blocks_have_to_be_left(pipe: Any, first_blocks: int) -> None:
    error = refusal(pipe, {"cache": {**EVERY_STEP, "first_blocks": first_blocks}})
    assert f"first_blocks = {first_blocks} leaves none of the transformer's 4" in error.faults[0]
    with optimized(pipe, {**EVERY_STEP, "first_blocks": 3}):
        pass


def test_a_hooked_forward_runs_with_its_hooks(make_pipe: Callable[[], Any], call: Call) -> None:
    """The transformer's own forward runs, whatever its owner has put around it."""
    pipe = make_pipe()
    expected = call(pipe)
    add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="cpu"))
    with optimized(pipe, EVERY_STEP) as fast:
        assert torch.equal(call(fast), expected)
    remove_hook_from_module(pipe.transformer)
    pipe.transformer.compile()
    assert "compiled as a whole" in refusal(pipe, {"cache": EVERY_STEP}).faults[0]


# --- compiled, and on a GPU -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    machine().compile_problem("cpu") is not None, reason="torch.compile cannot work here"
)
def test_the_decision_stays_outside_compiled_blocks(pipe: Any, call: Call) -> None:
    """Skipped and computed steps, other prompts, guidance: no more graphs than without a cache."""
    torch._dynamo.reset()
    counters.clear()
    with optimized(pipe, LINEAR) as fast:
        expected = call(fast, num_inference_steps=9)
        computed = fast.last_run.computed
        assert computed < 9
    with optimized(pipe, LINEAR, compile={}) as fast:
        got = call(fast, num_inference_steps=9)
        assert fast.last_run.computed == computed
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert counters["stats"]["unique_graphs"] == GRAPHS
        call(fast, "another prompt", num_inference_steps=12, seed=4, guidance_scale=2.0)
        call(fast, num_inference_steps=5, true_cfg_scale=2.0, negative_prompt="blurry")
        assert counters["stats"]["unique_graphs"] == GRAPHS
    torch._dynamo.reset()
