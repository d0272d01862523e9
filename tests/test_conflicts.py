"""Sections that cannot go together: each pair is refused with a fix, and the fix works."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.check import check
from hasten.conflicts import conflicts, why_no_graphs, why_no_kernels
from hasten.errors import UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.families.flux1.fused import reasons_against
from hasten.recipe import Recipe, preset_names, resolve
from tests.test_check import Capable

RESIDUAL = {"cache": {"kind": "residual"}}
ON = {"compile": {"mode": "none", "cuda_graphs": "on"}}
FULL = {"compile": {"mode": "full"}}
MODEL = {"offload": {"kind": "model"}}
MODULATION = {"offload": {"kind": "modulation"}}
KERNELS = {"fuse": {"kernels": "on"}}
GRAPH = {"kind": "onnxruntime"}
AUTO = {"attention": {"backend": "auto"}}

# sections, device, words of the fault, words of the fix, the sections as the fix says (None: out)
REFUSED: list[tuple[dict[str, Any], str, str, str, dict[str, Any]]] = [
    ({**RESIDUAL, **FULL}, "cpu", "decides between the blocks", 'compile.mode = "blocks"',
     {"compile": {"mode": "blocks"}}),
    ({**RESIDUAL, **ON}, "cuda", 'compile.cuda_graphs = "on"', 'compile.cuda_graphs = "auto"',
     {"compile": {"mode": "none", "cuda_graphs": "auto"}}),
    ({**RESIDUAL, "fuse": {}}, "cpu", "[fuse] runs them as one", "remove it", {"fuse": None}),
    ({**RESIDUAL, **AUTO}, "cuda", 'attention.backend = "auto"', 'attention.backend = "native"',
     {"attention": {"backend": "native"}}),
    ({**RESIDUAL, "fuse": {}}, "cpu", "[fuse]", 'kind = "interval"', {"cache": {}}),
    *(
        ({"engine": GRAPH, name: section}, "cpu", f"[{name}] changes them", f"remove [{name}]",
         {name: None})
        for name, section in (
            ("quantize", {"emulate": True}), ("fuse", {}), ("compile", {}),
            ("attention", {"backend": "native"}),
        )
    ),
    ({**RESIDUAL, "engine": GRAPH}, "cpu", "[engine] runs them", '"interval"', {"cache": {}}),
    ({**MODEL, "engine": GRAPH}, "cuda", "which [engine] replaces", '"modulation"', MODULATION),
    ({**FULL, "fuse": {}}, "cpu", "[fuse] splits", '"blocks"', {"compile": {"mode": "blocks"}}),
    ({**FULL, **AUTO}, "cuda", "times the backends", '"blocks"', {"compile": {"mode": "blocks"}}),
    ({"attention": {"backend": "cudnn"}}, "cpu", "NVIDIA", '"native"',
     {"attention": {"backend": "native"}}),
    ({**KERNELS, "compile": {}}, "cpu", "compiled instead", 'fuse.kernels = "auto"', {"fuse": {}}),
    ({**KERNELS, **MODEL}, "cuda", "moves weights that", 'fuse.kernels = "auto"', {"fuse": {}}),
    ({**KERNELS, "quantize": {"scheme": "int8-weight"}}, "cuda", 'none for "int8-weight"', '"auto"',
     {"fuse": {}}),
    ({**KERNELS, "quantize": {"emulate": True}}, "cpu", "do not emulate", '"auto"',
     {"fuse": {}}),
    ({**KERNELS, "quantize": {"granularity": "tensor"}}, "cuda", 'granularity = "row"', '"auto"',
     {"fuse": {}}),
    (ON, "cpu", "NVIDIA GPU, and this is cpu", 'cuda_graphs = "auto"',
     {"compile": {"mode": "none", "cuda_graphs": "auto"}}),
    ({**ON, **MODEL}, "cuda", "weight addresses", '"modulation"', {**MODULATION, "fuse": {}}),
    (MODEL, "cpu", "this is the CPU", "remove [offload]", {"offload": None}),
    (MODULATION, "cuda", "without the conditioning table", "conditioning = true", {"fuse": {}}),
    ({**MODULATION, "fuse": {"conditioning": False}}, "cuda", "without the conditioning table",
     "conditioning = true", {"fuse": {}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "device", "fault", "fix", "fixed"),
    REFUSED,
    ids=[f"{row[2]} → {row[3]}" for row in REFUSED],
)
def test_a_conflict_is_named_and_its_fix_works(
    sections: dict[str, Any], device: str, fault: str, fix: str, fixed: dict[str, Any]
) -> None:
    recipe = Recipe.from_dict(sections)
    (problem,) = conflicts(recipe, device)
    assert fault in problem.fault
    assert fix in problem.fix
    assert conflicts(recipe.but(**fixed), device) == []


def test_all_conflicts_come_at_once() -> None:
    recipe = Recipe.from_dict({**RESIDUAL, **FULL, **MODEL, "fuse": {}})
    assert len(conflicts(recipe, "cpu")) == 4


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_preset_is_in_conflict_with_itself(name: str, device: str) -> None:
    assert conflicts(resolve(name), device) == []


@pytest.mark.parametrize("name", ["lossless", "fp8", "balanced", "max"])
def test_the_fast_presets_get_all_they_ask_for_on_a_gpu(name: str) -> None:
    assert why_no_kernels(resolve(name)) is None
    assert why_no_graphs(resolve(name), "cuda") is None


@pytest.mark.parametrize(
    ("sections", "device", "why"),
    [
        ({}, "cpu", "the pipeline is on cpu"),
        (RESIDUAL, "cuda", "decides within a step"),
        (MODEL, "cuda", "moves the weights"),
        (MODULATION, "cuda", None),
    ],
    ids=str,
)
def test_when_auto_records_no_graphs(sections: Any, device: str, why: str | None) -> None:
    declined = why_no_graphs(Recipe.from_dict(sections), device)
    assert (declined is None) if why is None else (why in str(declined))


@pytest.mark.parametrize(
    ("quantize", "reason"),
    [
        ({"scheme": "fp8"}, "FP8 kernels need bfloat16: pass --dtype bfloat16"),
        ({"scheme": "fp8", "skip": ["*.attn.to_v"]}, "different kinds, Fp8Linear and Linear"),
    ],
    ids=["dtype", "skip"],
)
def test_kernels_that_quantised_layers_cannot_feed_are_refused_before_quantising(
    quantize: dict[str, Any], reason: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards would be too late: the original weights are freed."""
    monkeypatch.setattr(Capable, "quantize_problem", lambda *_, **__: None, raising=False)
    if "skip" in quantize:
        pipe.transformer.bfloat16()
    recipe = Recipe.from_dict({**KERNELS, "quantize": quantize})
    with pytest.raises(UnsupportedError) as caught:
        check(recipe, pipe, FLUX1, Capable())  # type: ignore[arg-type]
    assert reason in caught.value.faults[0]


def test_whole_blocks_may_be_skipped_beside_the_kernels(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Capable, "quantize_problem", lambda *_, **__: None, raising=False)
    pipe.transformer.bfloat16()
    quantize = {"scheme": "fp8", "skip": ["transformer_blocks.0"]}
    recipe = Recipe.from_dict({**KERNELS, "quantize": quantize})
    check(recipe, pipe, FLUX1, Capable())  # type: ignore[arg-type]


def test_a_forward_that_fusion_would_bypass_is_refused(pipe: Any) -> None:
    plain = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(UnsupportedError, match="was replaced or compiled") as caught:
        check(Recipe.from_dict({"fuse": {}}), pipe, FLUX1, Capable())  # type: ignore[arg-type]
    assert "remove [fuse]" in caught.value.fix


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_kernels_would_bypass_count_against_them(hook: str, pipe: Any) -> None:
    getattr(pipe.transformer.single_transformer_blocks[1].attn.to_k, hook)(lambda *given: None)
    assert reasons_against(pipe.transformer) == [
        "single_transformer_blocks.1: it, or a layer in it, has hooks or a replaced forward: "
        "remove them before optimising"
    ]
