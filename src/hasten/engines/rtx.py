"""Runs an engine on an RTX GPU with TensorRT for RTX, on torch's memory.

An engine is compiled for the current GPU when its first context is created and when a shape runs
for the first time. The result is stored in a runtime cache alongside the engine, which the next
process loads.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.atomic import write_bytes
from hasten.engines.tensorrt.files import RUNTIME_CACHE, read_regular
from hasten.engines.tensorrt.packages import error_log
from hasten.engines.tensorrt.step import OUTPUT
from hasten.errors import EngineError
from hasten.sealed import DamagedError

NO_DRIVER = "cudaError 35"


class RtxEngine:
    """One engine with one context, on its own stream, synchronised with torch's stream.

    Args:
        plan: The engine file.
        device: The GPU.

    Raises:
        EngineError: This machine cannot load the engine.
    """

    def __init__(self, plan: Path, device: torch.device) -> None:
        import tensorrt_rtx as trt

        self.cache_file = plan.with_name(RUNTIME_CACHE)
        self.sizes: set[int] = set()  # image tokens that have run
        self.device = device
        self.messages = error_log(trt)
        self.runtime = trt.Runtime(self.messages)
        with torch.cuda.device(device) if torch.cuda.is_available() else nullcontext():
            self.engine: Any = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise _refused(plan, self.messages.errors)
        with torch.cuda.device(device):
            config = self.engine.create_runtime_config()
            self.cache: Any = config.create_runtime_cache()
            with suppress(OSError, DamagedError):
                self.cache.deserialize(read_regular(self.cache_file))  # False: of another machine
            config.set_runtime_cache(self.cache)
            self.context: Any = self.engine.create_execution_context(config)
            if self.context is None:
                raise _refused(plan, self.messages.errors)
            self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        kinds = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
        }
        names = [self.engine.get_tensor_name(at) for at in range(self.engine.num_io_tensors)]
        self.dtypes = {name: kinds[self.engine.get_tensor_dtype(name)] for name in names}
        gpu = torch.cuda.get_device_name(device)
        self.description = f"TensorRT for RTX {trt.__version__} on {gpu}"

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Compute the velocity, 1×S×C in the engine's dtype.

        The call is asynchronous, as in torch, except for the first call of each size: it waits for
        the compilation of its kernels and stores them in the runtime cache.
        """
        if self.context is None:
            raise EngineError("the engine was closed", "optimise the pipeline again")
        current = torch.cuda.current_stream(self.device)
        given = {
            name: tensor.to(self.device, self.dtypes[name]).contiguous()
            for name, tensor in inputs.items()
        }
        for name, tensor in given.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise self._failed(f"does not support {name} of shape {tuple(tensor.shape)}")
            self.context.set_tensor_address(name, tensor.data_ptr())
        shape = tuple(self.context.get_tensor_shape(OUTPUT))
        velocity = torch.empty(shape, dtype=self.dtypes[OUTPUT], device=self.device)
        self.context.set_tensor_address(OUTPUT, velocity.data_ptr())
        self.stream.wait_stream(current)
        with torch.cuda.device(self.device):
            done = self.context.execute_async_v3(self.stream.cuda_stream)
        current.wait_stream(self.stream)
        if not done:
            raise self._failed("failed")
        if velocity.shape[1] not in self.sizes:
            self.sizes.add(velocity.shape[1])
            self._keep()
        return velocity

    def close(self) -> None:
        """Free the engine when the GPU has finished its work."""
        if self.context is not None:
            self.stream.synchronize()
        self.context = self.engine = self.cache = None

    def _keep(self) -> None:
        """Write the code compiled for this GPU so far to the runtime cache."""
        self.stream.synchronize()
        with suppress(OSError):  # there is no cache on a full or read-only disk
            write_bytes(self.cache_file, bytes(self.cache.serialize()))

    def _failed(self, how: str) -> EngineError:
        reason = f": {self.messages.errors[-1][:300]}" if self.messages.errors else ""
        return EngineError(f"the engine {how}{reason}", "see `hasten doctor`; export it again")


def _refused(plan: Path, errors: list[str]) -> EngineError:
    reason = errors[0][:300] if errors else "no reason given"
    if any(NO_DRIVER in error for error in errors):
        return EngineError(
            "TensorRT found no NVIDIA driver that supports CUDA 13",
            "install a driver of version 580 or newer",
        )
    return EngineError(
        f"TensorRT cannot load {plan}: {reason}",
        "export it for this GPU with this version: hasten export tensorrt --target ...",
    )
