"""Which linears are chosen, what is left alone, and what stands in the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.errors import UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.quantization.plan import LinearPlan, Linears, plan_linears, plan_problems
from hasten.recipe import Quantize


def linears_of(pipe: Any) -> Linears:
    return FLUX1.quantizable(pipe.transformer)


def plan(pipe: Any, **recipe: Any) -> LinearPlan:
    return plan_linears(pipe.transformer, linears_of(pipe), Quantize(**recipe))


def refused(pipe: Any, **recipe: Any) -> tuple[str, str]:
    problems = plan_problems(pipe.transformer, linears_of(pipe), Quantize(**recipe))
    assert len(problems) == 1, problems
    with pytest.raises(UnsupportedError) as caught:
        plan(pipe, **recipe)
    assert caught.value.faults == (problems[0].fault,)
    assert caught.value.fix == problems[0].fix
    return problems[0]


def test_all_of_the_blocks_but_the_modulations(pipe: Any) -> None:
    names = plan(pipe).names
    assert len(names) == 2 * 12 + 2 * 5
    assert "transformer_blocks.0.attn.to_out.0" in names
    assert "single_transformer_blocks.1.proj_out" in names
    assert not any("norm" in name for name in names)
    every = {name for name, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}
    left = {name for name in every - set(names) if "blocks" in name}
    assert {name.split(".")[2] for name in left} == {"norm1", "norm1_context", "norm"}
    assert all(name.endswith(".linear") for name in left)


def test_what_is_left_alone_is_said_with_its_reason(pipe: Any) -> None:
    said = dict(
        plan(pipe, skip=("transformer_blocks.0", "*.proj_out", "norm_out.linear")).unchanged
    )
    assert "skipped by the recipe, 12 in total" in said["transformer_blocks.0"]
    assert "skipped by the recipe, 2 in total" in said["*.proj_out"]
    assert "never quantised" in said["norm_out.linear"]
    (modulations,) = [names for names, why in said.items() if "modulation" in why]
    assert modulations == (
        "transformer_blocks.*.norm1.linear, transformer_blocks.*.norm1_context.linear, "
        "single_transformer_blocks.*.norm.linear"
    )
    (outside,) = [names for names, why in said.items() if "outside" in why]
    assert set(outside.split(", ")) == {
        "time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    [
        ("transformer_blocks.0.*", 12),
        ("transformer_blocks.0", 12),
        ("transformer_blocks.1.attn", 8),
        ("*.to_q", 4),
        ("single_transformer_blocks.?.attn.to_[qk]", 4),
        ("transformer_blocks.*", 24),
        ("*transformer_blocks.1*", 17),
    ],
)
def test_patterns(pipe: Any, pattern: str, skipped: int) -> None:
    assert len(plan(pipe, skip=(pattern,)).names) == 34 - skipped


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("transformer_block.0.*", "transformer_blocks.0.*"),
        ("*.to_qq", "*.to_q"),
        ("transformer_blocks.0.atn.to_q", "transformer_blocks.0.attn.to_q"),
    ],
)
def test_a_pattern_that_matches_nothing_names_near_ones(
    pipe: Any, pattern: str, nearest: str
) -> None:
    fault, fix = refused(pipe, skip=("*.to_k", pattern))
    assert repr(pattern) in fault
    assert nearest in fix.partition(";")[0].removeprefix("similar: ").split(", ")


def test_every_idle_pattern_is_named_at_once(pipe: Any) -> None:
    problems = plan_problems(
        pipe.transformer, linears_of(pipe), Quantize(skip=("nothing_like_it", "§"))
    )
    assert len(problems) == 2


def test_skipping_everything_is_refused(pipe: Any) -> None:
    fault, fix = refused(pipe, skip=("*",))
    assert "none of the 34 linears" in fault
    assert "skip" in fix


@pytest.mark.parametrize(("scheme", "multiple"), [("fp8", 16), ("int8", 8)])
def test_odd_shapes_are_left_alone_and_counted(pipe: Any, scheme: Any, multiple: int) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.ff.net[2] = nn.Linear(132, 32)
    made = plan(pipe, scheme=scheme)
    assert len(made.names) == 32
    said = dict(made.unchanged)
    why = said["2 × transformer_blocks.*.ff.net.2"]
    assert why == f"132 inputs, 32 outputs: {scheme} needs multiples of {multiple}"
    assert len(plan(pipe, scheme=f"{scheme}-weight").names) == 34


def test_only_odd_shapes_is_an_error(pipe: Any) -> None:
    linears = [("a", nn.Linear(12, 32)), ("b", nn.Linear(32, 12))]
    (problem,) = plan_problems(pipe.transformer, linears, Quantize())
    assert "multiples of 16" in problem.fault
    assert "int8-weight" in problem.fix


class LoraLinear(nn.Module):
    """What PEFT puts in a linear's place."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 16)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(16, base_layer.out_features)})


def test_adapters_must_be_fused_first(pipe: Any) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_q = LoraLinear(block.attn.to_q)
    fault, fix = refused(pipe, skip=("matches nothing",))
    assert "2 linears carry LoRA adapters (transformer_blocks.0.attn.to_q, …)" in fault
    assert "fuse_lora()" in fix
    assert "unload_lora_weights()" in fix


def quantised_by_another(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return linear


def of_a_tensor_class(linear: nn.Linear) -> nn.Linear:
    class Params4bit(nn.Parameter):
        pass

    linear.weight = Params4bit(linear.weight.detach())
    return linear


def of_another_class(linear: nn.Linear) -> nn.Linear:
    class Linear4bit(nn.Linear):
        pass

    return Linear4bit(linear.in_features, linear.out_features)


def offloaded(linear: nn.Linear) -> nn.Linear:
    return linear.to("meta")


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, args: None)
    return linear


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantised_by_another, "its weight is stored in int8"),
        (of_a_tensor_class, "its weight is of class Params4bit"),
        (of_another_class, "a Linear4bit"),
        (offloaded, "offloaded"),
        (hooked, "has hooks"),
    ],
)
def test_linears_that_are_more_than_linears(pipe: Any, change: Any, words: str) -> None:
    block = pipe.transformer.single_transformer_blocks[1]
    block.proj_mlp = change(block.proj_mlp)
    fault, fix = refused(pipe)
    assert words in fault
    assert "single_transformer_blocks.1.proj_mlp" in fault
    assert "bfloat16" in fix


def test_no_linears_at_all(pipe: Any) -> None:
    (problem,) = plan_problems(pipe.transformer, [], Quantize())
    assert "already quantised" in problem.fault
