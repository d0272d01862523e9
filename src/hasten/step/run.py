"""Sampling runs: the run and the step of each transformer call.

A run is created at its first transformer call and dropped at its end. The step is read from the
scheduler of the call, never counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hasten.errors import CallError
from hasten.step.protocols import Pipeline, Scheduler


@dataclass(frozen=True)
class RunCounts:
    """Counts of a finished or interrupted run.

    Attributes:
        steps: Sampling steps that were entered.
        computed: Steps on which the whole transformer ran, for any branch.
        skipped: All other steps.
        stored: Transformer calls whose results were stored for later steps, over all branches.
    """

    steps: int = 0
    computed: int = 0
    skipped: int = 0
    stored: int = 0


@dataclass(eq=False)
class Run:
    """One pass over `scheduler.timesteps`.

    The step is read from the scheduler, never counted, so it is right for guidance branches,
    interrupts and late starts (img2img). `timesteps` identifies the run: every call of
    `set_timesteps` creates a new tensor.

    Attributes:
        scheduler: The scheduler of the run.
        begin: Index of its first step.
        kept: The state of each layer for later steps, by the layer's name.
    """

    scheduler: Scheduler
    begin: int
    kept: dict[str, Any] = field(default_factory=dict)
    index: int = -1
    entered: set[int] = field(default_factory=set)
    computed: set[int] = field(default_factory=set)
    stored: int = 0

    def __post_init__(self) -> None:
        self.timesteps = self.scheduler.timesteps
        self._orders: dict[Hashable, int] = {}
        self._branches: set[Hashable] = set()
        self._timestep: Tensor | None = None

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the run's N steps and its end: N + 1 falling values."""
        steps = len(self.timesteps) - self.begin
        levels = [*self.scheduler.sigmas.tolist(), 0.0]
        return tuple(levels[self.begin : self.begin + steps + 1])

    @property
    def finished(self) -> bool:
        """Whether the last step was entered."""
        return self.index + 1 >= len(self.timesteps)

    def enter(self, index: int, caller: Hashable, timestep: object) -> Hashable:
        """Record a transformer call at scheduler index `index`.

        Some pipelines name their branches through `cache_context`. Unnamed calls of one step are
        distinguished by their order. The timestep of a new unnamed branch is compared with that of
        the step's first call, which waits for the device once per branch.

        Args:
            index: The scheduler's index.
            caller: Name of the cache context and shapes of the latents.
            timestep: The forward's timestep argument.

        Returns:
            The branch of the call.

        Raises:
            CallError: The call comes from another pipeline, whose scheduler is at another step.
        """
        if index != self.index:
            self.index = index
            self._orders.clear()
            self._timestep = timestep if isinstance(timestep, Tensor) else None
        order = self._orders.get(caller, 0)
        self._orders[caller] = order + 1
        branch = (caller, order)
        if branch not in self._branches:
            if order and not self._at_same_time(timestep):
                raise CallError(
                    "the transformer was called at two timesteps in one sampling step: another "
                    "pipeline with its own scheduler is using it",
                    "create that pipeline with `fast.from_pipe(PipelineClass)` and call the result",
                )
            self._branches.add(branch)
        self.entered.add(index)
        return branch

    def counts(self) -> RunCounts:
        """Steps entered, computed and skipped so far."""
        return RunCounts(
            steps=len(self.entered),
            computed=len(self.computed),
            skipped=len(self.entered - self.computed),
            stored=self.stored,
        )

    def _at_same_time(self, timestep: object) -> bool:
        if self._timestep is None or not isinstance(timestep, Tensor):
            return True
        first, current = self._timestep.flatten()[:1], timestep.flatten()[:1]
        return torch.equal(first.to(current), current)


@dataclass
class PipelineCall:
    """An unfinished call of an optimised pipeline.

    Attributes:
        scheduler: The pipeline's scheduler.
        runs: The sampling runs of the call so far, the current one last.
        outer: The call that made this one from a callback; None for most calls.
    """

    scheduler: Scheduler
    runs: list[Run] = field(default_factory=list)
    outer: PipelineCall | None = None

    def __post_init__(self) -> None:
        call = self.outer
        while call is not None:
            if call.scheduler is self.scheduler:
                raise CallError(
                    "the pipeline was called again during its own call: both calls would share "
                    "one scheduler",
                    "call a second pipeline with its own scheduler: "
                    "fast.from_pipe(PipelineClass, scheduler=copy.deepcopy(fast.scheduler))",
                )
            call = call.outer

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Assign transformer calls inside the context to this call."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[PipelineCall | None] = ContextVar(
    "call of an optimised pipeline", default=None
)


def current_call() -> PipelineCall | None:
    """The current call of an optimised pipeline; None outside a call."""
    return _current.get()


class SchedulerOf:
    """Returns a pipeline's current scheduler when called, since users may replace it.

    It holds a weak reference. After the pipeline is deleted, it returns the last scheduler.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = weakref.ref(pipe)
        self._last = pipe.scheduler

    def __call__(self) -> Scheduler:
        pipe = self._pipe()
        return self._last if pipe is None else pipe.scheduler

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerOf:
        """Refer to the copy of the pipeline if the pipeline is part of the deep copy."""
        pipe = self._pipe()
        duplicate = object.__new__(SchedulerOf)
        copied: Pipeline | None = memo.get(id(pipe), pipe)
        duplicate._pipe = self._pipe if copied is None else weakref.ref(copied)
        duplicate._last = memo.get(id(self._last), self._last)
        return duplicate


def step_index(scheduler: Scheduler) -> int | None:
    """The scheduler's position as an index into its `timesteps`.

    Returns:
        The index; None outside a sampling run or for a scheduler without `step_index`.
    """
    if not hasattr(scheduler, "step_index"):
        return None
    index = scheduler.step_index
    if index is None:
        index = scheduler.begin_index or 0
    if getattr(scheduler, "num_inference_steps", None) is None or index >= len(scheduler.timesteps):
        return None
    return int(index)


def outside_of_a_run(scheduler: Scheduler) -> CallError:
    """The error for a call whose step a step cache cannot determine."""
    if not hasattr(scheduler, "step_index") or not hasattr(scheduler, "sigmas"):
        return CallError(
            f"{type(scheduler).__name__} has no step_index or no sigmas, so the step is unknown",
            "use a flow-matching scheduler that has both, e.g. FlowMatchEulerDiscreteScheduler",
        )
    return CallError(
        "the transformer was called outside a sampling run of the pipeline's scheduler",
        "call the pipeline that optimize() returned; to use its transformer alone, restore() it",
    )
