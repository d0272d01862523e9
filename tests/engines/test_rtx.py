"""The engine's driver, as far as it runs without an RTX GPU: what it calls is there, and a machine
without a driver is told so."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

from hasten.engines import rtx
from hasten.errors import EngineError

trt = pytest.importorskip("tensorrt_rtx")

OWNERS = {
    "trt": trt,
    "runtime": trt.Runtime,
    "engine": trt.ICudaEngine,
    "config": trt.IRuntimeConfig,
    "cache": trt.IRuntimeCache,
    "context": trt.IExecutionContext,
}


def test_every_call_of_the_library_is_one_that_it_has() -> None:
    """No engine can run here, so at least its interface is held to the installed version."""
    called = []
    for node in ast.walk(ast.parse(inspect.getsource(rtx))):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        if name in OWNERS:
            called.append((name, node.attr))
            assert hasattr(OWNERS[name], node.attr), f"{name}.{node.attr}"
    assert {name for name, _ in called} == set(OWNERS)
    assert ("context", "execute_async_v3") in called


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a driver")
def test_without_a_driver_the_error_says_so(tmp_path: Path) -> None:
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"nothing")
    with pytest.raises(EngineError, match=r"no NVIDIA driver|cannot load") as caught:
        rtx.RtxEngine(plan, torch.device("cuda"))
    assert caught.value.fix
    assert len(caught.value.faults) == 1
