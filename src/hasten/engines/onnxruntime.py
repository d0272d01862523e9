"""Runs an exported graph on the CPU with onnxruntime: the engine's images without its speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.engines.tensorrt.packages import needed
from hasten.engines.tensorrt.step import OUTPUT
from hasten.errors import EngineError

ONNX_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


class OnnxRuntime:
    """An onnxruntime session for a graph file.

    onnxruntime has no bfloat16 products on a CPU, so a bfloat16 graph runs as its float32 version:
    the same nodes and values, including FP8 codes and scales, with less rounding in between.

    Args:
        graph: The graph file.

    Raises:
        EngineError: onnxruntime cannot load the graph.
    """

    def __init__(self, graph: Path) -> None:
        ort = needed("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised as exceptions
        try:
            self.session: Any = ort.InferenceSession(
                str(graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its error classes have no other common base
            raise EngineError(
                f"onnxruntime cannot load {graph.name}: {str(error).splitlines()[0][:200]}",
                "delete its folder, then export it again",
            ) from error
        self.dtypes = {one.name: ONNX_DTYPES[one.type] for one in self.session.get_inputs()}
        self.description = f"onnxruntime {ort.__version__} on the CPU (for quality, not for speed)"

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Compute the velocity, 1×S×C in the graph's dtype."""
        if self.session is None:
            raise EngineError("the engine was closed", "optimise the pipeline again")
        given = {
            name: tensor.detach().to("cpu", self.dtypes[name]).contiguous().numpy()
            for name, tensor in inputs.items()
        }
        (velocity,) = self.session.run([OUTPUT], given)
        return torch.from_numpy(velocity)

    def close(self) -> None:
        """Free the session."""
        self.session = None
