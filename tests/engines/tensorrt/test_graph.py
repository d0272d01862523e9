"""The float32 twin of a graph is the graph: held to torch, and read back node by node."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hasten.engines.tensorrt.export import in_precision
from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.graph import float32_twin
from hasten.engines.tensorrt.step import OUTPUT, Step, sample
from hasten.errors import EngineError
from tests.engines.tensorrt.conftest import (
    FAMILY,
    SHAPES,
    amax_of,
    small_transformer,
    unchanged_globals,
)

ir = pytest.importorskip("onnx_ir")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

Exported = Callable[[str], Path]
TOKENS = [(2, 3), (7, 5), (1, 1)]


@torch.no_grad()
def errors(path: Path, step: Step, dtype: torch.dtype) -> list[float]:
    """Relative ones of the velocity, onnxruntime against torch, at each of TOKENS."""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for height, width in TOKENS:
        model = small_transformer()
        inputs = sample(model, FAMILY, SHAPES, height, width, dtype, seed=3)
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        velocity = torch.from_numpy(session.run([OUTPUT], given)[0]).double()
        expected = step(**inputs).double()
        found.append(float((velocity - expected).norm() / expected.norm()))
    return found


def spoiled(folder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(folder, tmp_path / "spoiled") / GRAPH


def test_a_twin_equals_torch_where_nothing_is_quantised(exported: Exported, tmp_path: Path) -> None:
    step = Step(in_precision(small_transformer(), "bf16").float(), FAMILY)
    with unchanged_globals():
        float32_twin(exported("bf16") / GRAPH, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {GRAPH, DATA}
    assert max(errors(tmp_path / GRAPH, step, torch.float32)) < 1e-5


def test_a_quantised_twin_is_the_quantised_model(exported: Exported, tmp_path: Path) -> None:
    """Flipped codes pile up, so the bar is one of their size; without FP8 it would be missed."""
    model = small_transformer()
    quantised = Step(in_precision(model, "fp8", amax_of(model)).float(), FAMILY)
    plain = Step(in_precision(model, "bf16").float(), FAMILY)
    float32_twin(exported("fp8") / GRAPH, tmp_path)
    path = tmp_path / GRAPH
    near, far = errors(path, quantised, torch.float32), errors(path, plain, torch.float32)
    assert max(near) < 0.01
    assert min(far) > 2 * max(near)


def test_half_precision_runs_as_it_is(exported: Exported) -> None:
    step = Step(in_precision(small_transformer(), "fp16"), FAMILY)
    assert max(errors(exported("fp16") / GRAPH, step, torch.float16)) < 0.002


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_only_types_differ(exported: Exported, precision: str, tmp_path: Path) -> None:
    original = ir.load(exported(precision) / GRAPH).graph
    float32_twin(exported(precision) / GRAPH, tmp_path)
    onnx.checker.check_model(str(tmp_path / GRAPH))
    graph = ir.load(tmp_path / GRAPH).graph
    assert [node.op_type for node in graph] == [node.op_type for node in original]
    assert [value.name for value in graph.inputs] == [value.name for value in original.inputs]
    bfloat16 = ir.DataType.BFLOAT16
    for node, other in zip(graph, original, strict=True):
        assert [value.name for value in node.outputs] == [value.name for value in other.outputs]
        assert bfloat16 not in [value.dtype for value in node.outputs]
        assert bfloat16 not in [attribute.value for attribute in node.attributes.values()]
    assert bfloat16 not in [value.dtype for value in (*graph.inputs, *graph.outputs)]
    kinds = set()
    for name, value in graph.initializers.items():
        tensor, before = value.const_value, original.initializers[name].const_value
        assert tensor.dtype == value.dtype
        kinds.add(tensor.dtype)
        if before.dtype == bfloat16:
            assert tensor.dtype == ir.DataType.FLOAT
            assert (tensor.numpy() == before.numpy().astype("float32")).all()
        else:
            assert tensor.dtype == before.dtype
            assert tensor.tobytes() == before.tobytes()
    assert bfloat16 not in kinds
    assert (ir.DataType.FLOAT8E4M3FN in kinds) == (precision == "fp8")


def test_constants_inside_of_nodes_are_widened(tmp_path: Path) -> None:
    """None of the exporter's, but graphs may hold them."""
    source = tmp_path / "source"
    source.mkdir()
    half = onnx.helper.make_tensor("half", onnx.TensorProto.BFLOAT16, [1], [0.5])
    kind = onnx.TensorProto.BFLOAT16
    sizes = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [3])
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Constant", [], ["c"], value=half),
            onnx.helper.make_node("ConstantOfShape", ["shape"], ["d"], value=half),
            onnx.helper.make_node("Mul", ["c", "x"], ["e"]),
            onnx.helper.make_node("Add", ["d", "e"], ["y"]),
        ],
        "constants",
        [onnx.helper.make_tensor_value_info("x", kind, [3])],
        [onnx.helper.make_tensor_value_info("y", kind, [3])],
        [sizes],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, source / GRAPH)
    float32_twin(source / GRAPH, tmp_path)
    session = runtime.InferenceSession(str(tmp_path / GRAPH), providers=["CPUExecutionProvider"])
    given = {"x": torch.tensor([1.0, 2.0, 3.0]).numpy()}
    assert session.run(None, given)[0].tolist() == [1.0, 1.5, 2.0]


def refused(graph: Path, folder: Path, fault: str) -> None:
    before = list(folder.iterdir())
    with pytest.raises(EngineError, match=fault):
        float32_twin(graph, folder)
    assert list(folder.iterdir()) == before


def test_broken_graphs_are_refused(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "twin"
    folder.mkdir()
    graph = spoiled(exported("bf16"), tmp_path)
    refused(graph, graph.parent, "is the folder of the graph")
    written, weights = graph.read_bytes(), graph.with_name(DATA)
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(graph, folder, "ends before")
    weights.unlink()
    refused(graph, folder, "is missing")
    graph.write_bytes(written[: len(written) // 2])
    refused(graph, folder, "not a readable ONNX graph")
    graph.write_bytes(b"")
    refused(graph, folder, "not a readable ONNX graph")
    graph.unlink()
    refused(graph, folder, "not a readable ONNX graph")
