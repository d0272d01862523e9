"""CUDA graphs: record a step's kernels once a shape, replay them as one launch.

Launching FLUX.1's some two thousand kernels from Python takes longer than a small picture's
kernels run. A graph replays fixed kernels on fixed addresses, so inputs are copied into buffers of
the graph's own and its output is copied out; all graphs share one pool of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.errors import CallError, HastenError
from hasten.models.answer import answer
from hasten.passes.applied import Applied, replace_attribute

__all__ = ["Graphs", "graph_body", "graph_forward", "no_graphs"]

MOST_GRAPHS = 8
ADAPTERS = "unfused LoRA layers"
WARM_UPS = 2  # the first call compiles kernels and picks algorithms, the second allocates as usual


class Recording(NamedTuple):
    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class Graphs:
    """Functions of tensors, recorded once for each combination of shapes, dtypes and `key`.

    A function's answer must depend on nothing but its tensors, the key and weights that stay where
    they are. The `MOST_GRAPHS` recordings used last are kept; `bytes` is what all took.
    """

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Recording] = {}
        self.declined: set[str] = set()
        self.addresses: tuple[int, ...] = ()
        self.pool: Any = None
        self.bytes = 0

    def __call__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], key: Hashable = None
    ) -> Tensor:
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
        return recording.output.clone()

    def look_after(self, transformer: Any) -> None:
        """Forget all recordings if weights have moved: a graph would read where they were."""
        tensors = chain(transformer.parameters(), transformer.buffers())
        addresses = tuple(_address(tensor) for tensor in tensors)
        if addresses != self.addresses:
            self.drop()
            self.addresses = addresses

    def drop(self) -> None:
        """Forget all recordings and give their memory back."""
        self.recorded.clear()
        self.pool = None
        self.bytes = 0

    def _record(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Recording:
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
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], device: torch.device
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
            output = function(*buffers)
        self.bytes += max(0, torch.cuda.memory_reserved(device) - before)
        return Recording(graph, buffers, output)


def graph_body(forward: Any, *, insist: bool) -> Applied:
    """Record the body of a `FusedForward`: what a run needs once is an input of the graph.

    Calls that the body cannot take, and all calls under LoRA layers, whose scale is no tensor, run
    without a graph; where `insist`, they raise CallError.
    """
    graphs, body, original = Graphs(), forward.body, forward.original
    made = -1

    def recorded(*inputs: Tensor) -> Tensor:
        nonlocal made
        if _has_adapters(forward.transformer):
            _decline(graphs, ADAPTERS, insist=insist)
            return body(*inputs)  # type: ignore[no-any-return]
        if forward.constants.made != made:  # another run: look once
            made = forward.constants.made
            graphs.look_after(forward.transformer)
        return graphs(body, inputs)

    def unrecorded(*args: Any, **kwargs: Any) -> Any:
        _decline(graphs, "what the fused forward cannot take", insist=insist)
        return original(*args, **kwargs)

    def undo() -> None:
        forward.body, forward.original = body, original
        graphs.drop()

    forward.body, forward.original = recorded, unrecorded
    return _applied(graphs, undo)


def graph_forward(transformer: Any, family: Any, *, insist: bool) -> Applied:
    """Record the transformer's forward as it is now.

    A call with something that a graph cannot take as an input (ControlNet residuals, IP-Adapter
    embeddings), or under LoRA layers, runs as it did before; where `insist`, it raises CallError.
    """
    graphs, original = Graphs(), transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = family.inputs(transformer, args, kwargs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in inputs.items() if name not in tensors}
        against = ADAPTERS if _has_adapters(transformer) else _beyond(others)
        if against:
            _decline(graphs, against, insist=insist)
            return original(*args, **kwargs)

        def step(*values: Tensor) -> Tensor:
            given = dict(zip(tensors, values, strict=True))
            velocity: Tensor = original(**given, **others, return_dict=False)[0]
            return velocity

        graphs.look_after(transformer)
        key = tuple(tensors), tuple(sorted(_flat(others).items(), key=lambda item: item[0]))
        velocity = graphs(step, list(tensors.values()), key)
        return answer(velocity, kwargs)

    put_back = replace_attribute(transformer, "forward", forward)

    def undo() -> None:
        put_back()
        graphs.drop()

    return _applied(graphs, undo)


def no_graphs(why: str) -> Applied:
    """What `cuda_graphs = "auto"` leaves where there can be none."""
    return Applied(
        name="cuda graphs",
        what="none",
        undo=lambda: None,
        left_alone=(("the transformer's step", why),),
        declined=True,
    )


def _flat(others: dict[str, Any]) -> dict[str, Any]:
    """Inputs that are no tensors, those of the attention processors among them."""
    flat = {**others, **(others.get("joint_attention_kwargs") or {})}
    flat.pop("joint_attention_kwargs", None)
    return flat


def _beyond(others: dict[str, Any]) -> str:
    """Names of the inputs that are neither tensors nor plain values; empty where there is none."""
    plain = bool | int | float | None
    return ", ".join(name for name, value in _flat(others).items() if not isinstance(value, plain))


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a wrapper around others has no storage of its own
        return id(tensor)


def _has_adapters(transformer: Any) -> bool:
    return bool(getattr(transformer, "_hf_peft_config_loaded", False))


def _decline(graphs: Graphs, what: str, *, insist: bool) -> None:
    if insist:
        raise CallError(
            f"a CUDA graph cannot take {what} as an input",
            'set compile.cuda_graphs = "auto": such calls then run without a graph',
        )
    graphs.declined.add(what)


def _out_of_memory(error: RuntimeError) -> bool:
    """While recording it comes from the allocator, or from the driver under another class."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _applied(graphs: Graphs, undo: Callable[[], None]) -> Applied:
    def live() -> str:
        line = f"{len(graphs.recorded)} recorded, {graphs.bytes / 2**20:.0f} MiB"
        return "; ".join(
            [line, *(f"calls with {what} ran without" for what in sorted(graphs.declined))]
        )

    return Applied(
        name="cuda graphs",
        what="a computed step is one launch, recorded once a shape",
        undo=undo,
        live=live,
    )
