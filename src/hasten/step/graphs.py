"""CUDA graphs: a step's kernels are recorded once per shape and replayed as one launch.

Launching the roughly two thousand kernels of FLUX.1 from Python takes longer than running them for
a small image. A graph replays fixed kernels on fixed addresses, so inputs are copied into the
graph's own buffers and its outputs are copied out. All graphs share one memory pool.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hasten.errors import CallError, HastenError
from hasten.step.applied import Applied
from hasten.step.call import Inner, Output, StepCall
from hasten.step.chain import StepChain
from hasten.step.protocols import Transformer
from hasten.step.run import Run

Function = Callable[..., tuple[Tensor, ...]]
PLAIN = (bool, int, float, str, type(None))

MOST_GRAPHS = 8
ADAPTERS = "unfused LoRA layers"
WARM_UPS = 2  # the first call compiles kernels and selects algorithms; the second is typical


class Recording(NamedTuple):
    """A CUDA graph with its input buffers and its outputs."""

    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Functions of tensors, recorded once per combination of shapes, dtypes and `key`.

    The result of a function may depend only on its tensors, the key, and weights at fixed
    addresses. The `MOST_GRAPHS` most recently used recordings are kept.

    Attributes:
        bytes: GPU memory taken by all recordings.
    """

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Recording] = {}
        self.addresses: tuple[int, ...] = ()
        self.pool: Any = None
        self.bytes = 0

    def __call__(
        self, function: Function, inputs: Sequence[Tensor], key: Hashable = None
    ) -> tuple[Tensor, ...]:
        """Return `function(*inputs)` in newly allocated tensors."""
        key = key, tuple((x.shape, x.dtype, x.device) for x in inputs)
        recording = self.recorded.pop(key, None)
        if recording is None:
            while len(self.recorded) >= MOST_GRAPHS:
                del self.recorded[next(iter(self.recorded))]
            recording = self._record(function, inputs)
        self.recorded[key] = recording  # the newest last
        for buffer, value in zip(recording.inputs, inputs, strict=True):
            buffer.copy_(value, non_blocking=True)
        recording.graph.replay()
        return tuple(output.clone() for output in recording.outputs)

    def drop_if_moved(self, transformer: Transformer) -> None:
        """Drop all recordings if weights have moved: a graph would read their old addresses."""
        tensors = itertools.chain(transformer.parameters(), transformer.buffers())
        addresses = tuple(_address(tensor) for tensor in tensors)
        if addresses != self.addresses:
            self.drop()
            self.addresses = addresses

    def drop(self) -> None:
        """Drop all recordings and free their memory."""
        self.recorded.clear()
        self.pool = None
        self.bytes = 0

    def _record(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
        device = inputs[0].device
        outer_stream = torch.cuda.current_stream(device)
        try:
            with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
                return self._capture(function, inputs, device)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            torch.cuda.set_stream(outer_stream)  # a failed capture does not restore it
            self.drop()
            torch.cuda.empty_cache()
            raise HastenError(
                f"out of GPU memory while recording a CUDA graph: {str(error).splitlines()[0]}",
                'set compile.cuda_graphs = "off", use a smaller size, or quantise the weights '
                '(the preset "fp8")',
            ) from error

    def _capture(
        self, function: Function, inputs: Sequence[Tensor], device: torch.device
    ) -> Recording:
        buffers = tuple(value.clone(memory_format=torch.contiguous_format) for value in inputs)
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*buffers)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.empty_cache()  # the warm-up's memory does not count as the graph's
        before = torch.cuda.memory_reserved(device)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
        ):
            outputs = function(*buffers)
        self.bytes += max(0, torch.cuda.memory_reserved(device) - before)
        return Recording(graph, buffers, outputs)


class GraphLayer:
    """Records the rest of a step as a graph; the constants of a run are inputs of the graph.

    Calls with inputs that a graph does not support run without one. So do all calls with LoRA
    layers, whose scale is not a tensor.

    Args:
        transformer: The transformer.
        required: Raise CallError instead of running without a graph.
    """

    name = "graphs"

    def __init__(self, transformer: Transformer, *, required: bool) -> None:
        self.transformer = transformer
        self.required = required
        self.graphs = Graphs()
        self.without: set[str] = set()
        self.checked_run: Callable[[], Run | None] = _no_run
        self.trees: dict[Hashable, Output] = {}  # what recorded calls returned, without tensors

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        leaves, spec = tree_flatten((dict(call.inputs), dict(call.constants)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if why := self._against(call, others):
            self._run_without(why)
            return inner(call)
        if call.run is None or call.run is not self.checked_run():  # weights may move between runs
            self.checked_run = _no_run if call.run is None else weakref.ref(call.run)
            self.graphs.drop_if_moved(self.transformer)
        key = repr(spec), tuple(others), call.return_dict

        def step(*values: Tensor) -> tuple[Tensor, ...]:
            given = iter(values)
            mixed = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            inputs, constants = tree_unflatten(mixed, spec)
            output = inner(call.but(inputs, constants))
            self.trees[key] = output.but(())
            return output.tensors

        outputs = self.graphs(step, tensors, key)
        return self.trees[key].but(outputs)

    def drop(self) -> None:
        """Drop all recordings and free their memory."""
        self.graphs.drop()
        self.trees.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphLayer:
        """The copy has no recordings, because graphs hold addresses."""
        return GraphLayer(copy.deepcopy(self.transformer, memo), required=self.required)

    def live(self) -> str:
        line = f"{len(self.graphs.recorded)} recorded, {self.graphs.bytes / 2**20:.0f} MiB"
        return "; ".join(
            [line, *(f"calls with {inputs} ran without" for inputs in sorted(self.without))]
        )

    def _against(self, call: StepCall, others: Sequence[object]) -> str:
        """Why this call cannot use a graph; empty if it can."""
        if getattr(self.transformer, "_hf_peft_config_loaded", False):
            return ADAPTERS
        if all(isinstance(value, PLAIN) for value in others):
            return ""
        return ", ".join(
            name
            for name, value in call.inputs.items()
            if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in tree_leaves(value))
        )

    def _run_without(self, inputs: str) -> None:
        if self.required:
            raise CallError(
                f"a CUDA graph cannot take {inputs} as an input",
                'set compile.cuda_graphs = "auto": such calls then run without a graph',
            )
        self.without.add(inputs)


def record_graphs(chain: StepChain, *, required: bool) -> Applied:
    """Put CUDA graphs in front of a transformer's step.

    Args:
        chain: The transformer's chain.
        required: Raise CallError for calls that a graph does not support.
    """
    layer = GraphLayer(chain.transformer, required=required)
    chain.push(layer)
    return Applied(
        name="cuda graphs",
        description="a computed step is one launch, recorded once per shape",
        undo=partial(_undo, chain, layer),
        live=layer.live,
    )


def _no_run() -> None:
    return None


def _undo(chain: StepChain, layer: GraphLayer) -> None:
    chain.remove(layer.name)
    layer.drop()


def no_graphs(why: str) -> Applied:
    """The record of `cuda_graphs = "auto"` where graphs are not possible, with the reason."""
    return Applied(
        name="cuda graphs",
        description="none",
        undo=None,
        unchanged=(("the transformer's step", why),),
        fell_back=True,
    )


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a wrapper tensor without storage
        return id(tensor)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out; during a capture, the driver raises another class."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
