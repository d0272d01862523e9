"""CUDA graphs: record a step's kernels once per shape, replay them as one launch.

Launching FLUX.1's some two thousand kernels from Python takes longer than a small picture's
kernels run. A graph replays fixed kernels on fixed addresses, so inputs are copied into buffers of
the graph's own and its output is copied out; all graphs share one pool of memory.
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
WARM_UPS = 2  # the first call compiles kernels and picks algorithms, the second allocates as usual


class Recording(NamedTuple):
    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Functions of tensors, recorded once for each combination of shapes, dtypes and `key`.

    A function's result must depend on nothing but its tensors, the key and weights that stay where
    they are. The `MOST_GRAPHS` recordings used last are kept; `bytes` is what all took.
    """

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Recording] = {}
        self.addresses: tuple[int, ...] = ()
        self.pool: Any = None
        self.bytes = 0

    def __call__(
        self, function: Function, inputs: Sequence[Tensor], key: Hashable = None
    ) -> tuple[Tensor, ...]:
        """`function(*inputs)`, in memory of the caller's own."""
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

    def look_after(self, transformer: Transformer) -> None:
        """Forget all recordings if weights have moved: a graph would read where they were."""
        tensors = itertools.chain(transformer.parameters(), transformer.buffers())
        addresses = tuple(_address(tensor) for tensor in tensors)
        if addresses != self.addresses:
            self.drop()
            self.addresses = addresses

    def drop(self) -> None:
        """Forget all recordings and give their memory back."""
        self.recorded.clear()
        self.pool = None
        self.bytes = 0

    def _record(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
        device = inputs[0].device
        here = torch.cuda.current_stream(device)
        try:
            with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
                return self._capture(function, inputs, device)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            torch.cuda.set_stream(here)  # a capture that cannot end does not put it back
            self.drop()
            torch.cuda.empty_cache()
            raise HastenError(
                f"out of GPU memory while recording a CUDA graph: {str(error).splitlines()[0]}",
                'set compile.cuda_graphs = "off", make smaller pictures, or quantise the weights '
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
        torch.cuda.empty_cache()  # as the capture does: what the warm-up left is not the graph's
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
    """Records what is left of a step behind it; what a run needs once is an input of the graph.

    A call with something that a graph cannot take as an input runs without one, and so do all calls
    under LoRA layers, whose scale is no tensor; where `insist`, they raise CallError.
    """

    name = "graphs"

    def __init__(self, transformer: Transformer, *, insist: bool) -> None:
        self.transformer = transformer
        self.insist = insist
        self.graphs = Graphs()
        self.without: set[str] = set()
        self.looked_at: Callable[[], Run | None] = _no_run
        self.trees: dict[Hashable, Output] = {}  # what recorded calls returned, without tensors

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        leaves, spec = tree_flatten((dict(call.inputs), dict(call.constants)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if why := self._against(call, others):
            self._run_without(why)
            return inner(call)
        if call.run is None or call.run is not self.looked_at():  # weights move between runs
            self.looked_at = _no_run if call.run is None else weakref.ref(call.run)
            self.graphs.look_after(self.transformer)
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
        """Forget all recordings and give their memory back."""
        self.graphs.drop()
        self.trees.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphLayer:
        """Records again: a graph holds addresses."""
        return GraphLayer(copy.deepcopy(self.transformer, memo), insist=self.insist)

    def live(self) -> str:
        line = f"{len(self.graphs.recorded)} recorded, {self.graphs.bytes / 2**20:.0f} MiB"
        return "; ".join(
            [line, *(f"calls with {inputs} ran without" for inputs in sorted(self.without))]
        )

    def _against(self, call: StepCall, others: Sequence[object]) -> str:
        """Why this call has no graph; empty where it has one."""
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
        if self.insist:
            raise CallError(
                f"a CUDA graph cannot take {inputs} as an input",
                'set compile.cuda_graphs = "auto": such calls then run without a graph',
            )
        self.without.add(inputs)


def record_graphs(chain: StepChain, *, insist: bool) -> Applied:
    """Put CUDA graphs before a transformer's step."""
    layer = GraphLayer(chain.transformer, insist=insist)
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
    """What `cuda_graphs = "auto"` leaves where there can be none."""
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
    except RuntimeError:  # a wrapper around others has no storage of its own
        return id(tensor)


def _out_of_memory(error: RuntimeError) -> bool:
    """While recording it comes from the allocator, or from the driver under another class."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
