"""The graph on a CPU: dtypes at its border, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import EngineError

onnx = pytest.importorskip("onnx")


@pytest.fixture(params=["FLOAT", "FLOAT16"])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """velocity = latents + text, in float32 or float16."""
    kind = getattr(onnx.TensorProto, request.param)
    inputs = [onnx.helper.make_tensor_value_info(n, kind, [1, "S", 2]) for n in ("latents", "text")]
    output = onnx.helper.make_tensor_value_info("velocity", kind, [1, "S", 2])
    node = onnx.helper.make_node("Add", ["latents", "text"], ["velocity"])
    made = onnx.helper.make_graph([node], "sum", inputs, [output])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(made, opset_imports=opset), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_tensors_of_any_dtype_and_layout_are_taken(graph: Path) -> None:
    engine = OnnxRuntime(graph)
    latents = torch.arange(6.0).view(1, 2, 3).transpose(1, 2).bfloat16()
    velocity = engine.run({"latents": latents, "text": torch.ones(1, 3, 2)})
    assert torch.equal(velocity.float(), latents.float() + 1)
    assert "on the CPU" in engine.description


def test_a_closed_engine_says_so(graph: Path) -> None:
    engine = OnnxRuntime(graph)
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine.run({})


@pytest.mark.parametrize("content", [b"", b"no graph at all"])
def test_a_file_that_is_no_graph_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"onnxruntime cannot load model\.onnx") as caught:
        OnnxRuntime(tmp_path / "model.onnx")
    assert len(caught.value.faults) == 1
    assert "\n" not in caught.value.faults[0]
