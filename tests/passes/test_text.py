"""The cache of prompt embeddings is exact, bounded and undone; T5 in eight bits stays close."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import hasten
from hasten.benchmark.row import measure
from hasten.check import problems
from hasten.errors import HastenError, UnsupportedError
from hasten.machine import machine
from hasten.models import load_pipeline
from hasten.passes.text import weights
from hasten.passes.text.embeddings import CachedEncoder, EmbeddingStore, cache_off
from hasten.passes.text.weights import FeedForwardOutput, store_in_eight_bits
from hasten.quantization.linear import WeightOnlyLinear
from hasten.recipe import Recipe
from tests.benchmark import small_engine
from tests.benchmark.test_row import job_for, quiet

Call = Callable[..., torch.Tensor]

CACHED = Recipe.from_dict({"name": "cached", "text": {"cache_mb": 4}})
IDS = torch.tensor([[3, 9, 27, 1], [5, 6, 7, 1]])

ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"prompt": ["a cat", "a dog"]},
    "images per prompt": {"num_images_per_prompt": 3},
    "second prompt": {"prompt_2": "in the snow"},
    "longer text": {"max_sequence_length": 24},
    "true cfg": {"true_cfg_scale": 3.0, "negative_prompt": "blurry"},
    "true cfg, same prompt": {"true_cfg_scale": 3.0, "negative_prompt": "a red fox"},
    "lora scale": {"joint_attention_kwargs": {"scale": 0.5}},
}


class BoomError(Exception):
    pass


def counted(encoder: nn.Module) -> list[int]:
    """A list that grows with each run of the encoder's layers."""
    runs: list[int] = []
    layers = encoder.encoder
    forward = layers.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return forward(*args, **kwargs)

    layers.forward = counting
    return runs


@pytest.fixture
def t5(pipe: Any) -> Any:
    """The small pipeline's T5 encoder."""
    return pipe.text_encoder_2


def cached(encoder: nn.Module, limit: int = 2**20) -> CachedEncoder:
    return CachedEncoder(encoder, "encoder", EmbeddingStore(limit))


@torch.no_grad()
def answer(encoder: Any, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    hidden: torch.Tensor = encoder(ids, **kwargs)[0]
    return hidden


# The cache, through the pipeline


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_hit_is_bit_equal_and_runs_no_encoder(name: str, pipe: Any, call: Call) -> None:
    expected = call(pipe, **ARGUMENTS[name])
    fast = hasten.optimize(pipe, CACHED)
    assert torch.equal(call(fast, **ARGUMENTS[name]), expected)
    runs = counted(pipe.text_encoder), counted(pipe.text_encoder_2)
    assert torch.equal(call(fast, **ARGUMENTS[name]), expected)
    assert runs == ([], [])
    fast.restore()
    assert torch.equal(call(pipe, **ARGUMENTS[name]), expected)
    assert all(runs)


def test_any_order_of_calls_gives_the_plain_results(
    make_pipe: Callable[[], Any], call: Call
) -> None:
    plain, fast = make_pipe(), hasten.optimize(make_pipe(), CACHED)
    for name in ("batch", "plain", "true cfg", "longer text", "plain", "batch", "second prompt"):
        assert torch.equal(call(fast, **ARGUMENTS[name]), call(plain, **ARGUMENTS[name])), name


def test_pipelines_over_the_same_encoders_share_it(pipe: Any, call: Call) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    plain = FluxImg2ImgPipeline.from_pipe(pipe)
    expected = call(plain, image=image, strength=0.6)
    fast = hasten.optimize(pipe, CACHED)
    call(fast)
    runs = counted(pipe.text_encoder_2)
    for twin in (fast.from_pipe(FluxImg2ImgPipeline), FluxImg2ImgPipeline.from_pipe(pipe)):
        assert torch.equal(call(twin, image=image, strength=0.6), expected)
    assert runs == []


def test_the_summary_counts(pipe: Any, call: Call) -> None:
    fast = hasten.optimize(pipe, CACHED)
    call(fast)
    call(fast)
    call(fast, "a fox in the snow")
    text = fast.summary()
    assert "text: at most 4 MiB of prompt embeddings kept in host memory" in text
    assert "(4 kept, 0.01 MiB, 2 hits, 4 misses)" in text
    with cache_off():
        call(fast)
    assert "2 hits, 4 misses, 2 not cacheable" in fast.summary()


def test_restore_leaves_nothing_behind(pipe: Any) -> None:
    before = [dict(vars(encoder)) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    fast = hasten.optimize(pipe, CACHED)
    fast.restore()
    for encoder, own in zip((pipe.text_encoder, pipe.text_encoder_2), before, strict=True):
        assert vars(encoder).get("_compiled_call_impl") is None
        assert vars(encoder).keys() - {"_compiled_call_impl"} == own.keys() - {
            "_compiled_call_impl"
        }


def test_a_copy_has_a_cache_of_its_own(pipe: Any, call: Call) -> None:
    fast = hasten.optimize(pipe, CACHED, copy=True)
    call(fast)
    runs = counted(pipe.text_encoder_2)
    call(pipe)
    call(pipe)
    assert len(runs) == 2
    assert "0 hits, 2 misses" in fast.summary()


def test_compiled_encoders_are_wrapped_and_left_compiled(pipe: Any, call: Call) -> None:
    """Whoever compiled before keeps it; whoever compiles afterwards is not undone."""
    expected, t5 = call(pipe), pipe.text_encoder_2
    calls = []

    def compiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return t5._call_impl(*args, **kwargs)

    t5._compiled_call_impl = compiled
    fast = hasten.optimize(pipe, CACHED)
    assert torch.equal(call(fast), expected)
    assert torch.equal(call(fast), expected)
    assert len(calls) == 1
    fast.restore()
    assert t5._compiled_call_impl is compiled
    fast = hasten.optimize(pipe, CACHED)
    t5._compiled_call_impl = later = lambda *args, **kwargs: compiled(*args, **kwargs)
    fast.restore()
    assert t5._compiled_call_impl is later


def test_an_offloaded_encoder_stays_where_it_is_on_a_hit(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    fast = hasten.optimize(pipe, CACHED)
    call(fast)
    pipe.enable_model_cpu_offload(device="cpu")
    moved = []
    hook = pipe.text_encoder_2._hf_hook
    before = hook.pre_forward
    hook.pre_forward = lambda *args, **kwargs: moved.append(1) or before(*args, **kwargs)
    assert torch.equal(call(fast), expected)
    assert moved == []
    pipe.text_encoder_2._hf_hook.pre_forward = hook.pre_forward
    assert torch.equal(call(fast, "something new"), call(fast, "something new"))
    pipe.remove_all_hooks()
    assert torch.equal(call(fast), expected)


def test_an_encoder_that_is_not_loaded_is_named(pipe: Any, call: Call) -> None:
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt("a red fox", None, max_sequence_length=8)
    expected = call(pipe)
    pipe.text_encoder_2 = None
    fast = hasten.optimize(pipe, CACHED)
    assert "unchanged: text_encoder_2: not loaded" in fast.summary()
    given = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    assert torch.equal(call(fast, **given), expected)


def test_encoders_are_not_timed_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(*_: Any) -> None:
        raise AssertionError("the cache was asked")

    monkeypatch.setattr(EmbeddingStore, "get", get)
    row = measure(job_for(tmp_path, CACHED), small_engine, quiet).row
    assert "the cache of prompt embeddings was off while timing" in row.notes
    other = measure(job_for(tmp_path, Recipe()), small_engine, quiet).row
    assert not any("embeddings" in note for note in other.notes)


# The cache before one encoder


def test_who_changes_an_answer_does_not_change_the_kept_one(t5: Any) -> None:
    expected = answer(t5)
    cache = cached(t5)
    for _ in range(3):  # a miss, then hits
        got = answer(cache)
        assert torch.equal(got, expected)
        got.zero_()
    assert (cache.store.hits, cache.store.misses) == (2, 1)


def test_the_answer_has_the_form_that_was_asked_for(pipe: Any) -> None:
    """Named output, tuple, hidden states: each a question of its own, answered alike twice."""
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        cache = cached(encoder)
        for asked in ({}, {"output_hidden_states": True}, {"return_dict": False}):
            with torch.no_grad():
                expected = encoder(IDS, **asked)
                first, second = cache(IDS, **asked), cache(IDS, **asked)
            for got in (first, second):
                assert type(got) is type(expected)
                assert list(got) == list(expected) if isinstance(got, dict) else True
                assert_same(got, expected)
        assert (cache.store.hits, cache.store.misses) == (3, 3)


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
        assert left.dtype == right.dtype
        return
    lefts, rights = (list(x.values()) if hasattr(x, "values") else list(x) for x in (left, right))
    assert len(lefts) == len(rights)
    for one, other in zip(lefts, rights, strict=True):
        assert_same(one, other)


def test_every_argument_counts(t5: Any) -> None:
    cache = cached(t5)
    for arguments in (
        {},
        {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])},
        {"attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])},
    ):
        for _ in range(2):
            assert torch.equal(answer(cache, **arguments), answer(t5, **arguments))
    for ids in (IDS[:1], IDS[:, :3], IDS.flip(0), IDS.to(torch.int32)):
        assert torch.equal(answer(cache, ids), answer(t5, ids))
    assert (cache.store.hits, cache.store.misses) == (3, 7)


def write_counted(t5: Any) -> None:
    with torch.no_grad():
        t5.encoder.block[0].layer[0].SelfAttention.q.weight.mul_(1.5)


def write_uncounted(t5: Any) -> None:
    """As PEFT merges an adapter: torch's count of writes does not see it."""
    weight = t5.encoder.block[0].layer[0].SelfAttention.v.weight
    weight.data += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


def other_dtype(t5: Any) -> None:
    t5.to(torch.bfloat16)


def new_tokens(t5: Any) -> None:
    """As textual inversion adds tokens; the last row is the new one's."""
    t5.resize_token_embeddings(t5.shared.num_embeddings + 1)
    t5.shared.weight.data[-1] = 1.0


def another_linear(t5: Any) -> None:
    attention = t5.encoder.block[0].layer[0].SelfAttention
    attention.o = nn.Linear(16, 24, bias=False).requires_grad_(False).eval()


@pytest.mark.parametrize(
    "change", [write_counted, write_uncounted, other_dtype, new_tokens, another_linear]
)
def test_a_changed_encoder_is_asked_again(change: Callable[[Any], None], t5: Any) -> None:
    cache = cached(t5)
    before = answer(cache)
    change(t5)
    for _ in range(2):
        assert torch.equal(answer(cache), answer(t5))
    assert change is new_tokens or not torch.equal(answer(cache), before)
    assert (cache.store.hits, cache.store.misses) == (2 - (change is new_tokens), 2)


class Adapter(nn.Module):
    """What PEFT leaves in a module tree: the original within, and its state in attributes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.Linear(linear.in_features, 2, bias=False).requires_grad_(False)
        self.lora_B = nn.Linear(2, linear.out_features, bias=False).requires_grad_(False)
        self.scaling = {"default": 1.0}
        self.merged_adapters: list[str] = []
        self._active_adapter = ["default"]
        self.eval()

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        if self._active_adapter:
            y = y + self.scaling["default"] * self.lora_B(self.lora_A(x))
        return y


def test_adapters_and_their_scales_count(t5: Any) -> None:
    cache = cached(t5)
    plain = answer(cache)
    attention = t5.encoder.block[0].layer[0].SelfAttention
    adapter = attention.v = Adapter(attention.v)
    seen = [plain]
    for scale in (1.0, 0.5, 0.0):
        adapter.scaling["default"] = scale
        got = answer(cache)
        assert torch.equal(got, answer(t5))
        seen.append(got)
    adapter.scaling["default"] = 1.0
    adapter._active_adapter = []
    assert torch.equal(answer(cache), plain)
    assert not any(torch.equal(seen[1], other) for other in (seen[0], seen[2], seen[3]))
    misses = cache.store.misses
    adapter._active_adapter = ["default"]
    assert torch.equal(answer(cache), seen[1])
    assert cache.store.misses == misses


def test_a_real_adapter_on_clip(pipe: Any) -> None:
    """Loaded, scaled per call, fused into the weights and unloaded."""
    peft = pytest.importorskip("peft")
    fast = hasten.optimize(pipe, CACHED)

    def pooled(**kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            got = pipe.encode_prompt("a red fox", None, max_sequence_length=8, **kwargs)[1]
            with cache_off():
                again = pipe.encode_prompt("a red fox", None, max_sequence_length=8, **kwargs)[1]
        assert torch.equal(got, again)
        return got.clone()

    plain, clip = pooled(), pipe.text_encoder
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    clip.add_adapter(config)
    clip.eval().requires_grad_(False)
    scaled = [pooled(lora_scale=scale) for scale in (1.0, 0.5, 1.0, 0.25)]
    assert not torch.equal(scaled[0], plain)
    assert torch.equal(scaled[0], scaled[2])
    layers = [(name, part) for name, part in clip.named_modules() if hasattr(part, "base_layer")]
    for name, layer in layers:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(clip.get_submodule(parent), own, layer.get_base_layer())
    assert not torch.equal(pooled(), plain), "fused weights look like the original ones"
    fast.restore()


def test_autocast_counts(t5: Any) -> None:
    cache = cached(t5)
    answer(cache)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(answer(cache), answer(t5))
    assert torch.equal(answer(cache), answer(t5))
    assert (cache.store.hits, cache.store.misses) == (1, 2)


def gradients(t5: Any) -> None:
    t5.requires_grad_(True)


def dropout(t5: Any) -> None:
    t5.train()


def listener(t5: Any) -> None:
    t5.encoder.block[0].register_forward_hook(lambda *_: None)


def weights_elsewhere(t5: Any) -> None:
    t5.to("meta")


@pytest.mark.parametrize("change", [gradients, dropout, listener, weights_elsewhere])
def test_what_must_not_be_kept_is_not(change: Callable[[Any], None], t5: Any) -> None:
    cache = cached(t5)
    change(t5)
    for _ in range(2):
        output = cache(IDS)[0]
    assert output.requires_grad == (change is gradients)
    assert (len(cache.store), cache.store.hits, cache.uncached) == (0, 0, 2)


def test_an_answer_given_in_inference_mode_can_be_used_outside(t5: Any) -> None:
    cache = cached(t5)
    with torch.inference_mode():
        inside = cache(IDS)[0]
    outside = answer(cache)
    assert cache.store.hits == 1
    assert torch.equal(outside, inside)
    assert not outside.is_inference()


def test_an_error_in_an_encoder_leaves_nothing(t5: Any) -> None:
    expected, cache = answer(t5), cached(t5)
    forward = t5.encoder.forward

    def explode(*_: Any, **__: Any) -> None:
        raise BoomError

    t5.encoder.forward = explode
    with pytest.raises(BoomError):
        answer(cache)
    assert len(cache.store) == 0
    t5.encoder.forward = forward
    assert torch.equal(answer(cache), expected)
    assert torch.equal(answer(cache), expected)


def test_an_answer_that_cannot_be_copied_is_passed_on(t5: Any) -> None:
    t5._compiled_call_impl = lambda ids: SimpleNamespace(ids=ids)
    cache = cached(t5)
    assert cache(IDS).ids is IDS
    assert (len(cache.store), cache.uncached) == (0, 1)
    del t5._compiled_call_impl


def test_the_cache_stays_within_its_bytes(t5: Any) -> None:
    """Answers of 2 prompts × 4 tokens × 24 numbers, 4 bytes each, beside their keys."""
    one = cached(t5)
    answer(one)
    size = one.store.size
    assert 768 < size < 1024
    cache = cached(t5, limit=3 * size)
    several = [IDS + number for number in range(5)]
    for ids in several:
        answer(cache, ids)
        assert cache.store.size <= 3 * size
    assert (len(cache.store), cache.store.size) == (3, 3 * size)
    for ids in several[2:]:
        answer(cache, ids)
    assert cache.store.hits == 3
    answer(cache, several[0])
    answer(cache, several[3])  # still there: the third was the oldest
    assert (cache.store.hits, cache.store.misses) == (4, 6)


@given(
    limit=st.integers(0, 40),
    operations=st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 25))),
)
def test_the_store_is_a_bounded_lru(limit: int, operations: list[tuple[bool, int, int]]) -> None:
    """Against a plain model: keys in order of use, dropped from the front until all fit."""
    store, model = EmbeddingStore(limit), OrderedDict[int, int]()
    for reading, key, size in operations:
        if reading:
            assert store.get(key) == (f"{key}/{model[key]}" if key in model else None)
            if key in model:
                model.move_to_end(key)
            continue
        store.put(key, f"{key}/{size}", size)
        model.pop(key, None)
        if size <= limit:
            model[key] = size
            while sum(model.values()) > limit:
                model.popitem(last=False)
        assert store.size == sum(model.values()) <= limit
        assert len(store) == len(model)
        assert all(key in store for key in model)


# Weights in eight bits


@pytest.mark.parametrize(("scheme", "decibels"), [("fp8-weight", 18.0), ("int8-weight", 28.0)])
def test_t5_in_eight_bits_is_close_and_smaller(scheme: str, decibels: float) -> None:
    """On the bundled model. CLIP, embeddings and the relative position bias are untouched."""
    pipe = load_pipeline("tiny", device="cpu", dtype="float32")
    arguments = {"prompt": "a red circle on a blue ground", "prompt_2": None}
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(**arguments, max_sequence_length=32)
    fast = hasten.optimize(pipe, Recipe.from_dict({"text": {"scheme": scheme}}))
    t5 = pipe.text_encoder_2
    kinds = {type(part).__name__ for part in t5.modules()}
    assert {"WeightOnlyLinear", "FeedForwardOutput", "Embedding"} <= kinds
    assert "Linear" not in kinds
    assert t5.dtype == torch.float32
    with torch.no_grad():
        after, pooled_after, _ = fast.encode_prompt(**arguments, max_sequence_length=32)
    assert torch.equal(pooled_after, pooled)
    noise = (after - embeds).square().sum() / embeds.square().sum()
    assert 0 < noise < 10 ** (-decibels / 10)
    assert f"14 linears of T5EncoderModel in {scheme}: 2.8 → 0.7 MiB" in fast.summary()
    with pytest.raises(HastenError, match="freed as they were replaced"):
        fast.restore()


def test_each_linear_is_replaced_by_its_rounded_self(t5: Any) -> None:
    originals = {
        name: part.weight.clone() for name, part in t5.named_modules() if type(part) is nn.Linear
    }
    store_in_eight_bits(t5, "int8-weight")
    for name, weight in originals.items():
        part = t5.get_submodule(name)
        linear = part.linear if name.endswith("wo") else part
        assert isinstance(linear, WeightOnlyLinear)
        assert isinstance(part, FeedForwardOutput) == name.endswith("wo")
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        values = linear.weight.float() * linear.weight_scale
        assert ((values - weight).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("scheme", ["fp8-weight", "int8-weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_keep_their_dtype(scheme: Any, dtype: torch.dtype, t5: Any) -> None:
    """Transformers casts what `wo` gets to the dtype of `wo.weight`, which is now that of codes."""
    t5.to(dtype)
    expected = answer(t5)
    store_in_eight_bits(t5, scheme)
    got = answer(t5)
    assert got.dtype == dtype
    assert (got - expected).float().square().mean() < 0.05 * expected.float().square().mean()


@pytest.mark.parametrize("scheme", ["fp8-weight", "int8-weight"])
def test_wo_kept_in_float32_still_computes_in_float32(scheme: Any, t5: Any) -> None:
    """A float16 encoder holds `wo` in float32 because its products exceed 65504."""
    feed_forward = t5.half().encoder.block[0].layer[1].DenseReluDense
    feed_forward.wo.float()
    feed_forward.wo.weight.fill_(5000.0)
    feed_forward.act = nn.Identity()
    x = torch.full((1, 2, 24), 8.0, dtype=torch.float16)
    for linear in (feed_forward.wi_0, feed_forward.wi_1):
        linear.weight.fill_(0.05)
    expected = feed_forward(x)
    assert expected.isfinite().all()
    assert expected.min() > 65504
    store_in_eight_bits(t5, scheme)
    got = feed_forward(x)
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0)


def test_a_copy_keeps_the_original_weights(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    recipe = Recipe.from_dict({"text": {"scheme": "fp8-weight", "cache_mb": 4}})
    fast = hasten.optimize(pipe, recipe, copy=True)
    rounded = call(fast)
    assert not torch.equal(rounded, expected)
    assert torch.equal(call(pipe), expected)
    assert torch.equal(call(fast), rounded)
    assert "2 hits" in fast.summary()


def test_an_error_in_the_middle_says_how_much_was_replaced(
    t5: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Fragile(WeightOnlyLinear):
        @classmethod
        def from_linear(cls, linear: nn.Linear, *args: Any, **kwargs: Any) -> Any:
            if len(made) == 2:
                raise BoomError
            made.append(linear.weight.numel())
            return super().from_linear(linear, *args, **kwargs)

    monkeypatch.setattr(weights, "WeightOnlyLinear", Fragile)
    with pytest.raises(BoomError) as caught:
        store_in_eight_bits(t5, "int8-weight")
    assert caught.value.__notes__ == ["text: 2 linears were already replaced; load the model again"]
    largest = max(part.weight.numel() for part in t5.modules() if hasattr(part, "in_features"))
    assert made[0] == largest


# What cannot be done


def test_missing_encoders_are_refused(pipe: Any) -> None:
    pipe.text_encoder_2 = None
    with pytest.raises(UnsupportedError, match="has no text_encoder_2"):
        hasten.optimize(pipe, Recipe.from_dict({"text": {"scheme": "int8-weight"}}))
    pipe.text_encoder = None
    with pytest.raises(UnsupportedError, match="has no text encoders") as caught:
        hasten.optimize(pipe, CACHED)
    assert "[text]" in caught.value.fix


def test_weights_that_are_not_plain_are_refused(pipe: Any) -> None:
    recipe = Recipe.from_dict({"text": {"scheme": "int8-weight"}})
    store_in_eight_bits(pipe.text_encoder_2, "int8-weight")
    with pytest.raises(UnsupportedError, match=r"text_encoder_2: .*already"):
        hasten.optimize(pipe, recipe)


def test_adapted_weights_are_refused(pipe: Any) -> None:
    attention = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention
    attention.v = Adapter(attention.v)
    with pytest.raises(UnsupportedError, match=r"text_encoder_2: .*LoRA"):
        hasten.optimize(pipe, Recipe.from_dict({"text": {"scheme": "fp8-weight"}}))


def test_there_is_no_fp8_on_mps() -> None:
    for scheme, faults in (("fp8-weight", 1), ("int8-weight", 0)):
        recipe = Recipe.from_dict({"text": {"scheme": scheme}})
        assert len(problems(recipe, machine(), "mps")) == faults
