"""The pass: what it replaces, what it frees, what it leaves as it was, and how near the pictures
of the bundled model stay."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hasten
from hasten.errors import HastenError, ModelError, UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.machine import machine
from hasten.passes.quantize import quantize_linears
from hasten.quality import lpips, psnr
from hasten.quantization.linear import EmulatedLinear, Fp8Linear, Int8Linear, WeightOnlyLinear
from hasten.quantization.plan import plan_linears
from hasten.recipe import Quantize, Recipe
from tests.quantization.conftest import draw, tiny  # noqa: F401  (fixtures)

Call = Callable[..., torch.Tensor]
LINEARS = 34  # of the small pipeline: 2 × 12 in double-stream blocks, 2 × 5 in single-stream ones
STEPS = 6


def recipe(**quantize: Any) -> Recipe:
    return Recipe.from_dict({"quantize": quantize})


def classes(pipe: Any) -> Counter[type]:
    return Counter(type(pipe.transformer.get_submodule(name)) for name in names(pipe))


def names(pipe: Any) -> list[str]:
    return [
        f"{block_name}.{name}"
        for block_name, block in FLUX1.repeated_blocks(pipe.transformer)
        for name, module in block.named_modules()
        if hasattr(module, "in_features") and not name.startswith("norm")
    ]


class Products(TorchDispatchMode):
    """Counts the operations that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("quantize", "kind", "product"),
    [
        ({"scheme": "fp8"}, Fp8Linear, "_scaled_mm"),
        ({"scheme": "int8"}, Int8Linear, "int8_product"),
        ({"scheme": "int8-weight"}, WeightOnlyLinear, None),
        ({"scheme": "fp8", "emulate": True}, EmulatedLinear, None),
    ],
    ids=str,
)
def test_every_linear_is_replaced_and_the_fast_product_runs_for_each(
    pipe: Any, call: Call, quantize: dict[str, Any], kind: type, product: str | None
) -> None:
    expected = call(pipe)
    fast = hasten.optimize(pipe, recipe(**quantize))
    assert classes(pipe) == {kind: LINEARS}
    with Products() as products:
        got = call(fast)
    ran = {name: products.ran[name] for name in ("_scaled_mm", "int8_product")}
    expected_ran = {product: LINEARS * STEPS} if product else {}
    assert ran == {"_scaled_mm": 0, "int8_product": 0} | expected_ran
    assert not torch.equal(got, expected)
    assert (got - expected).norm() < 0.15 * expected.norm()


def test_the_summary_says_what_was_done_and_what_not(pipe: Any) -> None:
    fast = hasten.optimize(pipe, recipe(skip=["*.to_out.0"]))
    summary = fast.summary()
    assert "quantize: 32 linears in fp8, one scale per row: 0.3 → 0.1 MiB" in summary
    assert "unchanged: *.to_out.0: skipped by the recipe, 2 in total" in summary
    assert "single_transformer_blocks.*.norm.linear: modulation" in summary
    assert "norm_out, proj_out: outside the repeated blocks" in summary
    emulated = hasten.optimize(pipe_like(fast), recipe(emulate=True), copy=True).summary()
    assert "emulated: same rounding" in emulated


def pipe_like(fast: Any) -> Any:
    """Another plain pipeline of the same kind."""
    from hasten.models.random_weights import build_shape
    from tests.conftest import SMALL

    return build_shape(SMALL, torch.device("cpu"), torch.float32)


def test_originals_are_freed_as_they_are_replaced(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment are more than one original weight and its codes alive together."""
    linears = FLUX1.quantizable(pipe.transformer)
    plan = plan_linears(pipe.transformer, linears, Quantize())
    alive = [weakref.ref(linear.weight) for _, linear in linears]
    del linears
    seen: list[int] = []

    def quantized(linear: nn.Linear, recipe: Quantize, name: str) -> Any:
        seen.append(sum(reference() is not None for reference in alive))
        return Fp8Linear.from_linear(linear)

    monkeypatch.setattr("hasten.passes.quantize.quantized", quantized)
    quantize_linears(pipe.transformer, plan, Quantize())
    assert seen == list(range(LINEARS, 0, -1))
    assert not any(reference() is not None for reference in alive)


def test_the_largest_goes_first(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory runs out before anything is replaced, or not at all."""
    sizes = []

    def quantized(linear: nn.Linear, recipe: Quantize, name: str) -> Any:
        sizes.append(linear.weight.numel())
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Fp8Linear.from_linear(linear)

    monkeypatch.setattr("hasten.passes.quantize.quantized", quantized)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        hasten.optimize(pipe, recipe())
    assert classes(pipe) == {nn.Linear: LINEARS}
    assert not hasattr(caught.value, "__notes__")
    hasten.optimize(pipe, recipe())
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert FLUX1.quantizable(pipe.transformer) == []


def test_an_interruption_in_the_middle_says_how_far_it_was(
    pipe: Any, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 0

    def quantized(linear: nn.Linear, recipe: Quantize, name: str) -> Any:
        nonlocal done
        done += 1
        if done == 4:
            raise KeyboardInterrupt
        return Int8Linear.from_linear(linear)

    monkeypatch.setattr("hasten.passes.quantize.quantized", quantized)
    with pytest.raises(KeyboardInterrupt) as caught:
        hasten.optimize(pipe, recipe())
    assert "3 linears were already replaced" in caught.value.__notes__[0]
    assert torch.isfinite(call(pipe)).all()


def test_a_later_pass_that_fails_leaves_a_note_and_a_working_pipeline(
    make_pipe: Callable[[], Any], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("hasten.apply.cache_steps", fail)
    both = Recipe.from_dict({"quantize": {"scheme": "int8"}, "cache": {}})
    pipe = make_pipe()
    with pytest.raises(ZeroDivisionError) as caught:
        hasten.optimize(pipe, both)
    assert "quantize cannot be undone" in caught.value.__notes__[0]
    assert torch.isfinite(call(pipe)).all()
    pipe = make_pipe()
    expected = call(pipe)
    with pytest.raises(ZeroDivisionError):
        hasten.optimize(pipe, both, copy=True)
    assert torch.equal(call(pipe), expected), "a copy risks nothing"


def test_a_copy_leaves_the_original_alone(pipe: Any, call: Call) -> None:
    expected = call(pipe)
    weights = [linear.weight for _, linear in FLUX1.quantizable(pipe.transformer)]
    fast = hasten.optimize(pipe, recipe(scheme="int8"), copy=True)
    quantised = call(fast)
    assert classes(fast.pipe) == {Int8Linear: LINEARS}
    assert classes(pipe) == {nn.Linear: LINEARS}
    assert torch.equal(call(pipe), expected)
    assert torch.equal(call(fast), quantised)
    after = [linear.weight for _, linear in FLUX1.quantizable(pipe.transformer)]
    assert all(one is other for one, other in zip(after, weights, strict=True))


def test_it_cannot_be_undone_and_says_so(pipe: Any, call: Call) -> None:
    both = Recipe.from_dict({"quantize": {"scheme": "int8"}, "cache": {}})
    fast = hasten.optimize(pipe, both)
    quantised = call(fast)
    with pytest.raises(HastenError, match="quantize cannot be undone: the original weights") as no:
        fast.restore()
    assert "load the pipeline again" in no.value.fix
    assert "forward" not in pipe.transformer.__dict__, "the cache is undone all the same"
    assert not torch.equal(call(pipe), quantised)
    with pytest.raises(UnsupportedError, match="already quantised"):
        hasten.optimize(pipe, recipe())
    hasten.optimize(pipe, "cache")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(pipe: Any, bad: float) -> None:
    pipe.transformer.transformer_blocks[1].attn.to_k.weight.data[3, 3] = bad
    with pytest.raises(ModelError, match=r"transformer_blocks\.1\.attn\.to_k"):
        hasten.optimize(pipe, recipe())
    assert classes(pipe) == {nn.Linear: LINEARS}


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_touched(pipe: Any) -> None:
    with pytest.raises(UnsupportedError, match="matches no linear"):
        hasten.optimize(pipe, recipe(skip=["transformer_block.0"]))
    assert classes(pipe) == {nn.Linear: LINEARS}
    hasten.optimize(pipe, "baseline")


def test_other_passes_work_over_it(make_pipe: Callable[[], Any], call: Call) -> None:
    for cache in ({"interval": 1}, {"kind": "residual", "threshold": 1e-12}):
        int8 = {"quantize": {"scheme": "int8"}}
        alone = call(hasten.optimize(make_pipe(), Recipe.from_dict(int8)))
        cached = hasten.optimize(make_pipe(), Recipe.from_dict({**int8, "cache": cache}))
        assert torch.equal(call(cached), alone)
        assert cached.last_run.computed == STEPS


@pytest.mark.slow
@pytest.mark.skipif(
    machine().compile_problem("cpu") is not None, reason="torch.compile cannot work here"
)
def test_blocks_still_compile_once_a_class_and_match(
    make_pipe: Callable[[], Any], call: Call
) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain = call(make_pipe())
    expected = call(hasten.optimize(make_pipe(), recipe()))
    fast = hasten.optimize(make_pipe(), Recipe.from_dict({"quantize": {}, "compile": {}}))
    got = call(fast)
    graphs = counters["stats"]["unique_graphs"]
    call(fast, "another prompt", seed=3, num_inference_steps=3)
    assert counters["stats"]["unique_graphs"] == graphs == 3
    assert (got - expected).norm() < 0.3 * (expected - plain).norm()
    torch._dynamo.reset()


@pytest.mark.slow
def test_pictures_of_the_bundled_model_stay_near(tiny: Any, draw: Any) -> None:  # noqa: F811
    plain = draw(tiny)
    pictures = {}
    for quantize in ({}, {"emulate": True}, {"scheme": "int8"}):
        pictures[str(quantize)] = draw(hasten.optimize(tiny, recipe(**quantize), copy=True))
    for quantize, picture in pictures.items():
        assert lpips(picture, plain).item() <= 0.03, quantize
        assert psnr(picture, plain).item() >= 28, quantize
    assert psnr(pictures["{}"], pictures["{'emulate': True}"]).item() >= 28
    assert torch.equal(draw(tiny), plain), "copies leave it alone"
