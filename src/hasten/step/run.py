"""Sampling runs: which one a transformer call belongs to, and where it is in it.

A run is made at its first transformer call and dropped at its end. The step is read from the
scheduler that drives the call, never counted.
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
    """What a finished (or interrupted) run did.

    Attributes:
        steps: Sampling steps that were entered.
        computed: Those on which the whole transformer ran, for any branch.
        skipped: The others.
        stored: Transformer calls of which something was kept for later steps, over all branches.
    """

    steps: int = 0
    computed: int = 0
    skipped: int = 0
    stored: int = 0


@dataclass(eq=False)
class Run:
    """One pass over `scheduler.timesteps`.

    The step is read from the scheduler, never counted, so guidance branches, interrupts and late
    starts (img2img) cannot put it out of step. `timesteps` identifies the run: every call of
    `set_timesteps` makes a new tensor.

    Attributes:
        scheduler: What drives it.
        begin: Index of its first step.
        kept: What each layer keeps for later steps, by the layer's name.
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
        """Falling noise levels of the run's N steps and its end: N + 1 entries."""
        steps = len(self.timesteps) - self.begin
        levels = [*self.scheduler.sigmas.tolist(), 0.0]
        return tuple(levels[self.begin : self.begin + steps + 1])

    @property
    def finished(self) -> bool:
        """Whether its last step was entered."""
        return self.index + 1 >= len(self.timesteps)

    def enter(self, index: int, caller: Hashable, timestep: object) -> Hashable:
        """Note a transformer call at scheduler index `index`.

        Pipelines name their branches through `cache_context` or not at all; unnamed calls of one
        step are told apart by their order. Where such a branch is new, its timestep is compared
        with that of the step's first call, which waits for the device once per branch.

        Args:
            index: Where the scheduler is.
            caller: Name of the cache context and shapes of the latents.
            timestep: What the forward got as its timestep.

        Returns:
            The branch that the call belongs to.

        Raises:
            CallError: The call is another pipeline's, whose scheduler is somewhere else.
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
                    "pipeline with its own scheduler is driving it",
                    "make that pipeline with `fast.from_pipe(PipelineClass)` and call the result",
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
        first, here = self._timestep.flatten()[:1], timestep.flatten()[:1]
        return torch.equal(first.to(here), here)


@dataclass
class PipelineCall:
    """A call of an optimised pipeline that is going on.

    Attributes:
        scheduler: The pipeline's.
        runs: Its sampling runs so far, the current one last.
        outer: The call from whose callback this one was made.
    """

    scheduler: Scheduler
    runs: list[Run] = field(default_factory=list)
    outer: PipelineCall | None = None

    def __post_init__(self) -> None:
        call = self.outer
        while call is not None:
            if call.scheduler is self.scheduler:
                raise CallError(
                    "the pipeline was called again in the middle of its own call: both would "
                    "share one scheduler",
                    "call a second pipeline with a scheduler of its own: "
                    "fast.from_pipe(PipelineClass, scheduler=copy.deepcopy(fast.scheduler))",
                )
            call = call.outer

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Transformer calls in the block belong to this call."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[PipelineCall | None] = ContextVar(
    "call of an optimised pipeline", default=None
)


def current_call() -> PipelineCall | None:
    """The call of an optimised pipeline in which we are; None outside of any."""
    return _current.get()


class SchedulerOf:
    """The scheduler of a pipeline as it is when called, since users replace it.

    It does not keep the pipeline alive, and works on with the last scheduler after it is gone.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = weakref.ref(pipe)
        self._last = pipe.scheduler

    def __call__(self) -> Scheduler:
        pipe = self._pipe()
        return self._last if pipe is None else pipe.scheduler

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerOf:
        """The scheduler of the pipeline's copy, where the pipeline is being copied, too."""
        pipe = self._pipe()
        twin = object.__new__(SchedulerOf)
        copied: Pipeline | None = memo.get(id(pipe), pipe)
        twin._pipe = self._pipe if copied is None else weakref.ref(copied)
        twin._last = memo.get(id(self._last), self._last)
        return twin


def step_index(scheduler: Scheduler) -> int | None:
    """Where the scheduler is, as an index into its `timesteps`.

    Returns:
        None where it does not say, or where no sampling run is going on.
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
    """Why a step cache cannot follow a call."""
    if not hasattr(scheduler, "step_index") or not hasattr(scheduler, "sigmas"):
        return CallError(
            f"{type(scheduler).__name__} has no step_index or no sigmas, so the step is not known",
            "use a flow-matching scheduler that has both, e.g. FlowMatchEulerDiscreteScheduler",
        )
    return CallError(
        "the transformer was called outside a sampling run of the pipeline's scheduler",
        "call the pipeline that optimize() returned; to use its transformer alone, restore() it",
    )
