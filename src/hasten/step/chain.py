"""`StepChain` replaces the transformer's forward; no other code does.

The chain parses a call once, finds its run, step and branch, passes it through the layers, and
wraps their output once. Runs are serialised: `lock` is held during a call of the transformer, and
an optimised pipeline holds it during its whole call, so a second thread waits.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from hasten.errors import CallError
from hasten.step.applied import Replaced, replace_attribute
from hasten.step.call import Inner, Layer, Output, StepCall
from hasten.step.protocols import Scheduler, Transformer
from hasten.step.run import Run, current_call, step_index

# Outermost first. The cache decides before anything runs. The constants of a run are computed
# outside the CUDA graphs, which record the rest of a step. Compiled code is innermost.
ORDER = ("cache", "attention", "constants", "graphs", "body", "compile")

_context: ContextVar[str | None] = ContextVar("name of the cache context", default=None)


class RunLock:
    """A reentrant lock; a deep copy is a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, _: dict[int, Any]) -> RunLock:
        return RunLock()


class Runs:
    """Current runs by their scheduler; a deep copy is empty."""

    def __init__(self) -> None:
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()

    def of(self, scheduler: Scheduler) -> Run | None:
        return self._runs.get(scheduler)

    def begin(self, scheduler: Scheduler, index: int) -> Run:
        run = self._runs[scheduler] = Run(scheduler, begin=index)
        return run

    def end(self, scheduler: Scheduler) -> None:
        self._runs.pop(scheduler, None)

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    def __deepcopy__(self, _: dict[int, Any]) -> Runs:
        return Runs()


class StepChain:
    """Layers in front of one transformer's forward, named and sorted by `ORDER`.

    The chain replaces the forward when the first layer is pushed, and restores it when the last one
    is removed. Only this instance of the transformer is changed.

    Args:
        transformer: The pipeline's transformer; it may be compiled or offloaded.
        scheduler: Returns the scheduler for calls outside an optimised pipeline's call.
    """

    def __init__(self, transformer: Transformer, scheduler: Callable[[], Scheduler]) -> None:
        self.transformer = transformer
        self.scheduler = scheduler
        self.lock = RunLock()
        self.layers: list[Layer] = []
        self.runs = Runs()
        self.original: Callable[..., Any] = transformer.forward
        self._names = list(inspect.signature(type(plain_module(transformer)).forward).parameters)[
            1:
        ]
        self._replaced: list[Replaced] = []
        self._entry: Inner = self._forward

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Called in place of the transformer's forward, with the same arguments and result."""
        with self.lock:
            call = self._call(args, kwargs)
            output = self._entry(call)
            if call.run is not None and output.computed:
                call.run.computed.add(call.index)
            return output.value()

    def push(self, layer: Layer) -> None:
        """Insert a layer at its position in the order."""
        with self.lock:
            if not self.layers:
                self._install()
            self.layers = sorted([*self.layers, layer], key=lambda one: ORDER.index(one.name))
            self._link()

    def remove(self, name: str) -> None:
        """Remove the layer of that name, if there is one."""
        with self.lock:
            self.layers = [layer for layer in self.layers if layer.name != name]
            self._link()
            if not self.layers:
                while self._replaced:
                    self._replaced.pop()()

    def layer(self, name: str) -> Layer | None:
        """The layer of that name; None if there is none."""
        return next((layer for layer in self.layers if layer.name == name), None)

    @property
    def constants(self) -> Any:
        """The layer that makes a run's constants; its `made` counts them. None if there is none."""
        return self.layer("constants")

    def end_run(self, scheduler: Scheduler | None = None) -> None:
        """Drop the current run of a scheduler, by default that of the current call."""
        self.runs.end(scheduler or self.driving())

    def held_bytes(self) -> int:
        """Bytes that layers hold for runs that have not ended."""
        kept = [tensor for run in self.runs for tensor in tensors_in(run.kept)]
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in kept}.values())

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        return_dict = given.pop("return_dict", True)
        inputs = {name: given.pop(name) for name in self._names if name in given} | given
        run, index = self._run()
        first = tree_leaves(next(iter(inputs.values()), None))
        shapes = tuple(leaf.shape for leaf in first if isinstance(leaf, Tensor))
        caller = (_context.get(), shapes)
        branch = caller if run is None else run.enter(index, caller, inputs.get("timestep"))
        return StepCall(inputs, run, index, branch, return_dict is not False)

    def _run(self) -> tuple[Run | None, int]:
        """The current run and the scheduler's step index; starts a new run if one has begun."""
        scheduler = self.driving()
        index = step_index(scheduler)
        if index is None:
            return None, 0
        run = self.runs.of(scheduler)
        if run is None or run.timesteps is not scheduler.timesteps or index < run.index:
            run = self._new_run(scheduler, index)
        return run, index

    def _new_run(self, scheduler: Scheduler, index: int) -> Run:
        call = current_call()
        if call is not None and call.scheduler is scheduler:
            if call.runs and not call.runs[-1].finished:
                raise CallError(
                    "the pipeline's scheduler was set to other timesteps during a run: the plain "
                    "pipeline was called at the same time",
                    "call the pipeline that optimize() returned instead of the plain one: its "
                    "calls are serialised",
                )
            call.runs.append(run := self.runs.begin(scheduler, index))
            return run
        return self.runs.begin(scheduler, index)

    def driving(self) -> Scheduler:
        """The scheduler of the current call; outside a call, the pipeline's."""
        call = current_call()
        return self.scheduler() if call is None else call.scheduler

    def _forward(self, call: StepCall) -> Output:
        """The end of the chain: the original forward, with its hooks or compiled code."""
        arguments = dict(call.inputs)
        if not call.return_dict:
            arguments["return_dict"] = False
        return Output.of(self.original(**arguments))

    def _link(self) -> None:
        self._entry = self._forward
        for layer in reversed(self.layers):
            self._entry = partial(layer, inner=self._entry)

    def _install(self) -> None:
        transformer: Any = self.transformer
        self.original = transformer.forward
        compiled = transformer.__dict__.get("_compiled_call_impl")
        if compiled is not None:  # nn.Module.compile: it would trace into the chain
            self.original = partial(self._without_chain, compiled)
            self._replaced.append(replace_attribute(transformer, "_compiled_call_impl", None))
        self._replaced.append(self._take_forward())
        if hasattr(transformer, "cache_context"):
            named = partial(_named_context, transformer.cache_context)
            self._replaced.append(replace_attribute(transformer, "cache_context", named))
        if hasattr(transformer, "_reset_stateful_cache"):  # called at the end of every pipeline
            ended = partial(self._end_of_call, transformer._reset_stateful_cache)
            self._replaced.append(replace_attribute(transformer, "_reset_stateful_cache", ended))

    def _take_forward(self) -> Replaced:
        return replace_attribute(self.transformer, "forward", self)

    def _without_chain(self, function: Callable[..., Any], **arguments: object) -> Any:
        """Call a function while the original forward is in place."""
        taken = next(one for one in self._replaced if one.name == "forward")
        taken()
        try:
            return function(**arguments)
        finally:
            self._replaced[self._replaced.index(taken)] = self._take_forward()

    def _end_of_call(self, reset: Callable[..., None], recurse: bool = True) -> None:
        with self.lock:
            self.end_run()
            reset(recurse)


@contextmanager
def _named_context(original: Callable[..., Any], name: str, **where: object) -> Iterator[None]:
    token = _context.set(name)
    try:
        with original(name, **where):
            yield
    finally:
        _context.reset(token)


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in the state of a layer: in containers, and in objects with a `kept()` method."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "kept"):
        value = list(value.kept())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def plain_module(module: Any) -> Any:
    """The module inside the wrapper of `torch.compile(module)`; any other module unchanged."""
    return getattr(module, "_orig_mod", module)
