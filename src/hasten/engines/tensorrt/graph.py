"""The float32 twin of a graph file, for machines whose runtime has no bfloat16.

The twin is the same graph with BFLOAT16 read as FLOAT. Nodes, names, shapes, weights and FP8 codes
are the same, so it computes what the graph computes, except for the rounding in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.packages import needed
from hasten.engines.tensorrt.step import STATE
from hasten.errors import EngineError

TYPES = "to", "dtype"  # attributes that name the type a node gives


def float32_twin(graph: Path, folder: Path, *, with_states: bool = False) -> list[str]:
    """Write the twin of a graph and its weights, one weight at a time, into an existing folder.

    A graph without bfloat16 gives a plain copy. Both files have the names of the originals.

    Args:
        graph: The graph's file, with its weights alongside.
        folder: Another folder than the graph's.
        with_states: Whether the twin has the blocks' outputs as further outputs.

    Returns:
        The names of the blocks' outputs.

    Raises:
        EngineError: The graph or its weights cannot be read.
        OSError: The folder cannot be written.
    """
    ir = needed("onnx_ir")
    if graph.parent.resolve() == folder.resolve():
        raise EngineError(f"{folder} holds the graph itself", "write its twin into another folder")
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
    """The graph, with all of the weights that it refers to in their place."""
    again = "export it again"
    try:
        model = ir.load(graph)
    except Exception as error:  # what protobuf and onnx_ir raise for a broken file is any type
        raise EngineError(f"{graph} is no readable ONNX graph: {error}", again) from error
    if not model.graph.outputs:
        raise EngineError(f"{graph} is no readable ONNX graph: it has no output", again)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            path = Path(tensor.path)
            if not path.is_file() or path.stat().st_size < tensor.offset + tensor.length:
                raise EngineError(f"{path} ends before {name}, or is not there", again)
    return model


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _widened(tensor: Any, ir: Any) -> Any:
    """A bfloat16 tensor as float32, made when it is written; any other as it is."""
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
