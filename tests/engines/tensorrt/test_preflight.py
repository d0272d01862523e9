"""What would stop an export is said before anything is made, all of it at once."""

from __future__ import annotations

import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.engines.tensorrt import preflight
from hasten.engines.tensorrt.preflight import (
    ExportOptions,
    check_exportable,
    check_request,
    graph_bytes,
)
from hasten.errors import EngineError, Faults, HastenError, InputError, UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.machine import Machine

GIB = 1 << 30
FAMILY = FLUX1
OPTIONS = ExportOptions("fp8", ("sm89",), (512, 512))
ROOMY = Machine("3.11", "Linux", "a CPU", 2, 1 << 50, "2.11")


def faults_of(asked: ExportOptions, out: Path | None = None) -> list[HastenError]:
    faults = Faults()
    check_request(asked, out, faults)
    return faults.errors


def model_faults(
    transformer: Any, asked: ExportOptions = OPTIONS, machine: Machine = ROOMY, **places: float
) -> list[HastenError]:
    faults = Faults()
    given = {Path(name): times for name, times in places.items()}
    check_exportable(asked, transformer, FAMILY, given, machine, faults)
    return faults.errors


def test_nothing_to_say(tmp_path: Path, pipe: Any) -> None:
    assert faults_of(OPTIONS, tmp_path / "new" / "engine") == []
    assert model_faults(pipe.transformer) == []
    assert list(tmp_path.iterdir()) == []


def test_all_faults_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "file").write_text("")
    asked = ExportOptions("fp8", ("sm86", "sm90"), (100, 512), "entropy")
    found = [fault for error in faults_of(asked, tmp_path / "file") for fault in error.faults]
    parts = ("win32", "not installed: onnx", "width 100", "'entropy'", "sm86", "sm90", "a file")
    assert len(found) == len(parts)
    for part, fault in zip(parts, found, strict=True):
        assert part in fault


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_other_systems(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    (error,) = faults_of(OPTIONS)
    assert isinstance(error, UnsupportedError)
    assert system in error.faults[0]
    assert "on Linux" in error.fix


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("onnx", None),
        ("onnxscript", None),
        ("onnx_ir", None),
        ("onnxruntime", replace(OPTIONS, verify=False)),
        ("tensorrt_rtx", replace(OPTIONS, targets=())),
        ("modelopt", replace(OPTIONS, precision="bf16")),
    ],
)
def test_the_extra_is_not_installed(
    module: str, without: ExportOptions | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (error,) = faults_of(OPTIONS)
    assert isinstance(error, UnsupportedError)
    assert error.faults == (f"not installed: {module}",)
    assert error.fix == "pip install 'hasten[tensorrt]'"
    if without is not None:
        assert faults_of(without) == []


@pytest.mark.parametrize("size", [(16, 16), (0, 0), (512, 513), (512, 9000)])
def test_sizes_that_cannot_be(size: tuple[int, int]) -> None:
    (error,) = faults_of(replace(OPTIONS, max_size=size))
    assert isinstance(error, InputError)
    assert error.fix


def test_image_tokens() -> None:
    assert ExportOptions("bf16", (), (1024, 512)).most_tokens == 2048
    assert ExportOptions("bf16", ()).most_tokens == 16384


def test_unfused_lora(pipe: Any) -> None:
    pipe.transformer.proj_out.base_layer = nn.Linear(2, 2)
    (error,) = model_faults(pipe.transformer)
    assert isinstance(error, EngineError)
    assert "LoRA" in error.faults[0]
    assert "fuse_lora()" in error.fix


class Int8Tensor(Tensor):
    """What a library of tensor classes makes of a weight: nn.Parameter keeps its class."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Int8Tensor:
        return Tensor._make_subclass(cls, codes)


class GGUFParameter(nn.Parameter):
    """As Diffusers' own, which cannot be imported without the package gguf."""

    def __new__(cls, codes: Tensor) -> GGUFParameter:
        return Tensor._make_subclass(cls, codes, False)


@pytest.mark.parametrize(
    ("quantised", "kind"),
    [
        (lambda weight: nn.Parameter(Int8Tensor(weight)), "of class Int8Tensor"),
        (lambda weight: GGUFParameter(weight.to(torch.uint8)), "of class GGUFParameter"),
        (lambda weight: stored_in(weight, torch.uint8), "stored in uint8"),
        (lambda weight: stored_in(weight, torch.float8_e4m3fn), "stored in float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_weights_that_another_library_has_quantised(
    pipe: Any, quantised: Any, kind: str, precision: str
) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_k.weight = quantised(block.attn.to_k.weight.detach())
    (error,) = model_faults(pipe.transformer, replace(OPTIONS, precision=precision))
    assert isinstance(error, UnsupportedError)
    assert error.faults == (
        "2 weights of the transformer are already quantised; "
        f"transformer_blocks.0.attn.to_k.weight is {kind}",
    )
    assert error.fix == "load the plain model: the export quantises it itself (--precision fp8)"


def stored_in(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_in_any_dtype_that_torch_computes_in(pipe: Any, dtype: torch.dtype) -> None:
    assert model_faults(pipe.transformer.to(dtype)) == []


def test_bytes_of_the_graph(pipe: Any) -> None:
    transformer = pipe.transformer
    every = sum(p.numel() for p in transformer.parameters())
    plain = graph_bytes(transformer, FAMILY, "bf16")
    assert plain == graph_bytes(transformer, FAMILY, "fp16")
    assert every < plain < 2 * every  # without the modulations
    codes = sum(linear.weight.numel() for _, linear in FAMILY.quantizable(transformer))
    assert graph_bytes(transformer, FAMILY, "fp8") == plain - codes


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (replace(OPTIONS, verify=False), "building"),
        (replace(OPTIONS, targets=()), "checking the graph"),
        (replace(OPTIONS, targets=(), verify=False), "exporting"),
    ],
)
def test_not_enough_memory(
    pipe: Any, asked: ExportOptions, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "graph_bytes", lambda *_: 8 * GIB)
    monkeypatch.setattr(preflight, "_parameters", lambda *_: 8 * GIB)
    (error,) = model_faults(pipe.transformer, asked, replace(ROOMY, ram_bytes=GIB // 4))
    assert isinstance(error, UnsupportedError)
    assert error.faults[0].startswith(f"{what} takes about ")
    assert error.faults[0].endswith("this machine has 256 MiB")
    assert ("--no-verify" in error.fix) == (what == "checking the graph")
    assert model_faults(pipe.transformer, asked, replace(ROOMY, ram_bytes=None)) == []


def test_building_takes_two_and_a_half_times_the_weights(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "graph_bytes", lambda *_: 8 * GIB)
    monkeypatch.setattr(preflight, "status_bytes", lambda _: GIB)
    asked = replace(OPTIONS, verify=False)
    assert model_faults(pipe.transformer, asked, replace(ROOMY, ram_bytes=22 * GIB)) == []
    (error,) = model_faults(pipe.transformer, asked, replace(ROOMY, ram_bytes=21 * GIB))
    assert "takes about 21.5 GiB" in error.faults[0]


def test_not_enough_disk(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(preflight, "graph_bytes", lambda *_: GIB)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(7 * GIB))
    store, out = str(tmp_path / "cache" / "deep"), str(tmp_path / "engine")
    assert model_faults(pipe.transformer, **{store: 4.0, out: 2.0}) == []
    (error,) = model_faults(pipe.transformer, **{store: 6.0, out: 2.0})
    assert "takes about 8.0 GiB" in error.faults[0]
    assert "has 7.0 GiB free" in error.faults[0]
    assert "HASTEN_CACHE" in error.fix
