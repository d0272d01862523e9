"""Graph files: how they are written, their float32 twins, and their blocks' outputs.

The float32 twin of a bfloat16 graph is for machines whose runtime has no bfloat16: the same graph
with BFLOAT16 read as FLOAT. Nodes, names, shapes, weights and FP8 codes are the same, so it
computes what the graph computes, except for the rounding in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.packages import needed
from hasten.engines.tensorrt.step import STATE
from hasten.errors import EngineError

__all__ = ["float32_twin", "hide", "label", "opened", "place"]

PAGE = 4096  # bytes: large values begin at one, so that they can be mapped into memory
WORD = 64  # bytes: small ones begin at a multiple of it
TYPES = "to", "dtype"  # attributes that name the type a node gives
AT_ONCE = 1 << 24  # values widened at a time


def place(file: BinaryIO, length: int) -> int:
    """The offset of the next value of `length` bytes; the file is filled up to there with zeros."""
    step = PAGE if length >= PAGE else WORD
    offset = -(-file.tell() // step) * step
    file.write(b"\0" * (offset - file.tell()))
    return offset


def float32_twin(graph: Path, folder: Path) -> Path:
    """Write the twin of a graph and its weights, one weight at a time, into an existing folder.

    A graph without bfloat16 gives a plain copy.

    Returns:
        The twin's path.

    Raises:
        EngineError: The graph or its weights cannot be read.
        OSError: The folder cannot be written.
    """
    ir = needed("onnx_ir")
    if graph.parent.resolve() == folder.resolve():
        raise EngineError(f"{folder} holds the graph itself", "write its twin into another folder")
    model = _read(graph, ir)
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
    """FLOAT for BFLOAT16: in values, in constants of the graph and in the types of outputs."""
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


def label(model: Any, names: Sequence[str]) -> None:
    """Name the outputs of an onnx_ir model behind the first."""
    outputs = model.graph.outputs[1:]
    for value, name in zip(outputs, names, strict=True):
        value.name = name


def hide(model: Any) -> None:
    """Make every output but the first an inner value again; nodes that only they needed go."""
    del model.graph.outputs[1:]
    needed("onnx_ir.passes.common").RemoveUnusedNodesPass()(model)


def opened(twin: Path) -> tuple[Path, list[str]]:
    """Write a copy of a twin alongside it, with its named states as further outputs.

    Returns:
        The path of the copy, and the names of the states.
    """
    onnx = needed("onnx")
    model = onnx.load(twin, load_external_data=False)
    names = [name for node in model.graph.node for name in node.output if name.startswith(STATE)]
    for name in names:
        model.graph.output.add().name = name
    path = twin.with_name("opened.onnx")
    onnx.save(model, path)
    return path, names
