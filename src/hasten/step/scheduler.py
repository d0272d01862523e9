"""Which sampling run a transformer call belongs to: that of the scheduler which drives it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hasten.errors import CallError

__all__ = ["driven_by", "driving", "scheduler_of", "step_of"]

_scheduler: ContextVar[Any] = ContextVar("scheduler of the running call", default=None)


@contextmanager
def driven_by(scheduler: Any) -> Iterator[None]:
    """Transformer calls inside belong to a run of this scheduler."""
    token = _scheduler.set(scheduler)
    try:
        yield
    finally:
        _scheduler.reset(token)


def driving(home: Callable[[], Any]) -> Any:
    """The scheduler of the running call; outside of `driven_by`, what `home` answers."""
    return _scheduler.get() or home()


def scheduler_of(pipe: Any) -> Callable[[], Any]:
    """The pipeline's scheduler as it is when asked (users replace it); survives the pipeline."""
    reference, scheduler = weakref.ref(pipe), pipe.scheduler

    def current() -> Any:
        alive = reference()
        return scheduler if alive is None else alive.scheduler

    return current


def step_of(scheduler: Any) -> int:
    """The step the scheduler stands at, as an index into its `timesteps`.

    Raises CallError where it does not say, or where no sampling run is going on.
    """
    if not hasattr(scheduler, "step_index") or not hasattr(scheduler, "sigmas"):
        raise CallError(
            f"{type(scheduler).__name__} does not say at which step it is",
            "use a scheduler with step_index and sigmas, e.g. FlowMatchEulerDiscreteScheduler",
        )
    index = scheduler.step_index
    if index is None:
        index = scheduler.begin_index or 0
    if getattr(scheduler, "num_inference_steps", None) is None or index >= len(scheduler.timesteps):
        raise CallError(
            "the transformer was called outside a sampling run of the pipeline's scheduler",
            "call scheduler.set_timesteps first, or restore() the pipeline for other uses",
        )
    return int(index)
