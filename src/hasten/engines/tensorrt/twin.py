"""The float32 twin of a bfloat16 graph, for machines whose runtime has no bfloat16.

The very graph with BFLOAT16 read as FLOAT: nodes, names, shapes, weights and FP8 codes are the
same, so it computes what the graph computes, but for the rounding of what is in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hasten.engines.tensorrt.files import DATA, GRAPH, place, writing
from hasten.engines.tensorrt.packages import needed
from hasten.errors import EngineError

__all__ = ["float32_twin"]

TYPES = "to", "dtype"  # attributes that name the type a node gives
AT_ONCE = 1 << 24  # values widened at a time


def float32_twin(graph: Path, folder: Path) -> Path:
    """Write the twin of a graph and its weights into a folder that is there; its path in it.

    Weights are read and written one at a time. A graph without bfloat16 gives a plain copy. Raises
    EngineError where the graph or its weights cannot be read or the folder not be written, and
    leaves no file then.
    """
    ir = needed("onnx_ir")
    if graph.parent.resolve() == folder.resolve():
        raise EngineError(f"{folder} holds the graph itself", "write its twin into another folder")
    model = _read(graph, ir)
    with writing(folder):
        _widen_weights(model, ir, folder)
        _retype(model, ir)
        ir.save(model, folder / GRAPH)
    return folder / GRAPH


def _read(graph: Path, ir: Any) -> Any:
    """The graph, with all of the weights that it refers to in their place."""
    again = "export it again"
    try:
        model = ir.load(graph)
    except Exception as error:  # what protobuf and onnx_ir raise for a broken file is any type
        raise EngineError(f"{graph} is no readable ONNX graph: {error}", again) from error
    if not model.graph.outputs:
        raise EngineError(f"{graph} is no readable ONNX graph: it has no output", again)
    for value in _external(model, ir):
        tensor = value.const_value
        path = Path(tensor.path)
        if not path.is_file() or path.stat().st_size < tensor.offset + tensor.length:
            raise EngineError(f"{path} ends before {value.name}, or is not there", again)
    return model


def _external(model: Any, ir: Any) -> list[Any]:
    return [
        value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]


def _widen_weights(model: Any, ir: Any, folder: Path) -> None:
    """Write the weights as the twin has them, and refer to them."""
    with (folder / DATA).open("wb") as file:
        for value in _external(model, ir):
            tensor = value.const_value
            wide = tensor.dtype == ir.DataType.BFLOAT16
            length = tensor.nbytes * 2 if wide else tensor.nbytes
            offset = place(file, length)
            for part in _parts(tensor, wide):
                file.write(part)
            value.const_value = ir.ExternalTensor(
                DATA,
                offset,
                length,
                ir.DataType.FLOAT if wide else tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=str(folder),
            )
            tensor.release()


def _parts(tensor: Any, wide: bool) -> Iterator[bytes]:
    """A tensor's bytes in order, bfloat16 widened: float32 is the same with 16 bits of zeros."""
    values = np.frombuffer(tensor.tobytes(), np.uint16 if wide else np.uint8)
    for first in range(0, len(values), AT_ONCE):
        part = values[first : first + AT_ONCE]
        yield (part.astype("<u4") << 16).tobytes() if wide else part.tobytes()


def _retype(model: Any, ir: Any) -> None:
    """FLOAT for BFLOAT16: of values, of constants in the graph, of what nodes are told to give."""
    graph = model.graph
    for value in graph.initializers.values():
        if value.const_value.dtype == ir.DataType.BFLOAT16:
            value.const_value = ir.tensor(
                value.const_value.numpy().astype(np.float32), name=value.name
            )
        _retype_value(value, ir)
    for value in graph.inputs:
        _retype_value(value, ir)
    for node in graph.all_nodes():
        for value in node.outputs:
            _retype_value(value, ir)
        for name, attribute in list(node.attributes.items()):
            if name in TYPES and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
            elif attribute.type == ir.AttributeType.TENSOR:
                constant = attribute.value
                if constant.dtype == ir.DataType.BFLOAT16:
                    wide = ir.tensor(constant.numpy().astype(np.float32), name=constant.name)
                    node.attributes[name] = ir.AttrTensor(name, wide)


def _retype_value(value: Any, ir: Any) -> None:
    if value.dtype == ir.DataType.BFLOAT16:
        value.dtype = ir.DataType.FLOAT
