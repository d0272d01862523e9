"""Graph files: how they are written, their float32 twins, and their blocks' outputs.

The float32 twin of a bfloat16 graph is for machines whose runtime has no bfloat16: the same graph
with BFLOAT16 read as FLOAT. Nodes, names, shapes, weights and FP8 codes are the same, so it
computes what the graph computes, except for the rounding in between.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.packages import needed
from hasten.engines.tensorrt.step import STATE
from hasten.engines.tensorrt.store import FIX_SPACE, out_of_space
from hasten.errors import EngineError

__all__ = ["float32_twin", "hide", "label", "opened", "place", "writing"]

PAGE = 4096  # bytes: large values begin at one, so that they can be mapped into memory
WORD = 64  # bytes: small ones begin at a multiple of it
TYPES = "to", "dtype"  # attributes that name the type a node gives
AT_ONCE = 1 << 24  # values widened at a time


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Both files of a graph are there once this is left, or neither.

    Raises:
        EngineError: They cannot be written.
    """
    try:
        yield
    except BaseException as error:
        for name in (GRAPH, DATA):
            (folder / name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise EngineError(
                f"the graph cannot be written to {folder}: {error.strerror or error}",
                FIX_SPACE if out_of_space(error) else "see that the folder can be written",
            ) from error
        raise


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
        EngineError: The graph or its weights cannot be read or the folder cannot be written; no
            file is left then.
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


def opened(graph: Path, folder: Path) -> tuple[Path, list[str]]:
    """Copy a graph file into a folder, with its named states as further outputs.

    Weights are linked, or copied where the file system cannot link them.

    Returns:
        The path of the copy, and the names of the states.

    Raises:
        EngineError: The file is no graph or names no state.
    """
    onnx = needed("onnx")
    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError and its kin share no base
        raise _unreadable(graph, str(error) or type(error).__name__) from error
    names = [name for node in model.graph.node for name in node.output if name.startswith(STATE)]
    if not names:
        raise _unreadable(graph, "it names no block")
    for name in names:
        model.graph.output.add().name = name
    if graph.parent != folder:
        for weights, size in _weights(model).items():
            _bring(graph.with_name(weights), folder / weights, size)
    path = folder / "opened.onnx"
    onnx.save(model, path)
    return path, names


def _weights(model: Any) -> dict[str, int]:
    """Files beside the graph that its weights are in, and how many bytes each has at least."""
    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            end = int(place["offset"]) + int(place["length"])
            sizes[place["location"]] = max(end, sizes.get(place["location"], 0))
    return sizes


def _bring(source: Path, target: Path, size: int) -> None:
    """Link a file, or copy it; EngineError where it is not there or shorter than `size`."""
    found = source.stat().st_size if source.is_file() else 0
    if found < size:
        raise _unreadable(source, f"it has {found} of {size} bytes")
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _unreadable(path: Path, why: str) -> EngineError:
    return EngineError(
        f"{path} is not a graph that this version of hasten exported: {' '.join(why.split())}",
        "delete the folder it is in and export again",
    )
