"""Which scheduler drives a transformer call, and at which step it is."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from hasten.errors import CallError
from hasten.step.protocols import Pipeline, Scheduler
from hasten.step.run import Run

__all__ = ["PipelineCall", "SchedulerOf", "current_call", "outside_of_a_run", "step_index"]


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
