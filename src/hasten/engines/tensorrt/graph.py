"""The float32 version of a graph file, for runtimes without bfloat16.

It is the same graph with FLOAT instead of BFLOAT16. Nodes, names, shapes, weights and FP8 codes are
the same, so its results differ only by the rounding of intermediate values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.packages import needed
from hasten.engines.tensorrt.step import STATE
from hasten.errors import EngineError

TYPES = "to", "dtype"  # attributes with the output type of a node


def float32_twin(graph: Path, folder: Path, *, with_states: bool = False) -> list[str]:
    """Write the float32 version of a graph, one weight at a time, into an existing folder.

    A graph without bfloat16 is copied unchanged. Both files have the names of the originals.

    Args:
        graph: The graph file, with its weights alongside.
        folder: A folder other than the graph's.
        with_states: Whether to add the blocks' outputs to the graph's outputs.

    Returns:
        The names of the blocks' outputs.

    Raises:
        EngineError: The graph or its weights cannot be read.
        OSError: The folder cannot be written.
    """
    ir = needed("onnx_ir")
    if graph.parent.resolve() == folder.resolve():
        raise EngineError(f"{folder} is the folder of the graph itself", "use another folder")
    model = _read(graph, ir)
    for value in _values(model.graph):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        value.const_value = _widened(value.const_value, ir)
    for node in model.graph.all_nodes():
        _widen_attributes(node, ir)
    states = [value for value in _values(model.graph) if value.name.startswith(STATE)]
    if with_states:
        model.graph.outputs.extend(states)
    ir.save(model, folder / GRAPH, external_data=DATA)
    return [value.name for value in states]


def _read(graph: Path, ir: Any) -> Any:
    """Read the graph and check that all of its weights are present."""
    again = "export it again"
    try:
        model = ir.load(graph)
    except Exception as error:  # protobuf and onnx_ir raise many types for a broken file
        raise EngineError(f"{graph} is not a readable ONNX graph: {error}", again) from error
    if not model.graph.outputs:
        raise EngineError(f"{graph} is not a readable ONNX graph: it has no output", again)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            path = Path(tensor.path)
            if not path.is_file() or path.stat().st_size < tensor.offset + tensor.length:
                raise EngineError(f"{path} is missing, or ends before {name}", again)
    return model


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _widened(tensor: Any, ir: Any) -> Any:
    """A bfloat16 tensor as float32, converted when it is written; any other one unchanged."""
    if tensor.dtype != ir.DataType.BFLOAT16:
        return tensor
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype("float32")),
        dtype=ir.DataType.FLOAT,
        shape=tensor.shape,
        name=tensor.name,
    )


def _widen_attributes(node: Any, ir: Any) -> None:
    for name, attribute in list(node.attributes.items()):
        if name in TYPES and attribute.value == ir.DataType.BFLOAT16:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
        elif attribute.type == ir.AttributeType.TENSOR:
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value, ir))
