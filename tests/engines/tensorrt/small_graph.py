"""A graph with an engine's inputs and output that builds in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hasten.engines.tensorrt.files import DATA, GRAPH
from hasten.engines.tensorrt.manifest import Shapes

SHAPES = Shapes(text=8, least=4, best=16, most=64)
CHANNELS, HEAD = 64, 16


def write_small_graph(folder: Path, *, text: int = SHAPES.text) -> Path:
    """velocity = latents · W + means of the other inputs, in float16, W in its own file."""
    folder.mkdir(parents=True, exist_ok=True)
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    given = [
        ("latents", half, [1, "s", CHANNELS]),
        ("text", half, [1, text, 24]),
        ("row", half, [1, 32]),
        ("cos", single, [f"{text} + s", HEAD]),
        ("sin", single, [f"{text} + s", HEAD]),
    ]
    weight = np.random.default_rng(0).standard_normal((CHANNELS, CHANNELS)).astype(np.float16)
    nodes = [helper.make_node("MatMul", ["latents", "weight"], ["product"])]
    total = "product"
    for name, kind, _ in given[1:]:
        nodes.append(helper.make_node("ReduceMean", [name], [f"{name}_mean"], keepdims=0))
        mean = f"{name}_mean"
        if kind == single:
            nodes.append(helper.make_node("Cast", [mean], [f"{name}_half"], to=half))
            mean = f"{name}_half"
        last = name == "sin"
        nodes.append(helper.make_node("Add", [total, mean], ["velocity" if last else f"to_{name}"]))
        total = f"to_{name}"
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(*each) for each in given],
        [helper.make_tensor_value_info("velocity", half, [1, "s", CHANNELS])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(
        model,
        folder / GRAPH,
        save_as_external_data=True,
        location=DATA,
        size_threshold=0,
    )
    return folder / GRAPH
