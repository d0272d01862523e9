"""The step cache before a transformer: it knows which step of which run a call belongs to.

What the call gets is the policy's affair (`planned`, `residual`); the decision is taken outside
compiled code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from hasten.errors import CallError
from hasten.models.answer import answer
from hasten.passes.applied import Applied, replace_attribute
from hasten.passes.cache.planner import Planner
from hasten.passes.cache.state import Branch, Run, RunCounts
from hasten.step.scheduler import driving, scheduler_of, step_of

__all__ = ["Policy", "StepCache", "cache_steps"]

# A step has at most this many transformer calls of one name and shape: conditional, unconditional,
# and two more for perturbed guidance. More of them without a scheduler step in between means that
# another pipeline, with a scheduler of its own, drives this transformer.
MOST_CALLS_IN_STEP = 4


class Policy(Protocol):
    """How the calls of a transformer are answered; `keeps` names what it keeps for later steps."""

    keeps: str

    @property
    def planner(self) -> Planner | None:
        """What plans a run before it starts, where anything does."""

    def begin(self, sigmas: Sequence[float]) -> Callable[[], Branch]:
        """A run over N falling noise levels and its end (N + 1 entries): what makes a branch of it,
        at the branch's first call."""

    def describe(self) -> str:
        """One line for the summary."""


class StepCache:
    """Stands before one transformer's forward; holds a `Run` for each scheduler that drives it."""

    def __init__(self, policy: Policy, home: Callable[[], Any]) -> None:
        self.policy = policy
        self.home = home
        self.context: str | None = None
        self.runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
        self.last_run = RunCounts()
        self.peak_bytes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called in place of the transformer's forward, with its arguments and its result."""
        latents: Tensor = args[0] if args else kwargs["hidden_states"]
        run, index = self._run()
        branch = run.enter(index, (self.context, latents.shape))
        if max(run.calls_in_step.values()) > MOST_CALLS_IN_STEP:
            raise _foreign_driver()
        value = run.answer(branch, args, kwargs)
        if index in run.computed:  # nothing is kept on other steps
            self.peak_bytes = max(self.peak_bytes, run.bytes_held())
        return answer(value, kwargs)

    @property
    def planner(self) -> Planner | None:
        """The policy's."""
        return self.policy.planner

    def drop(self) -> None:
        """Forget the current run; its counts stay readable as `last_run`."""
        run = self.runs.pop(driving(self.home), None)
        if run is not None:
            self.last_run = run.counts()

    def _run(self) -> tuple[Run, int]:
        """The current run and the scheduler's step in it; a new run where a new one has begun."""
        scheduler = driving(self.home)
        index = step_of(scheduler)
        run = self.runs.get(scheduler)
        if run is None or run.timesteps is not scheduler.timesteps or index < run.index:
            steps = len(scheduler.timesteps) - index
            sigmas = [*scheduler.sigmas.tolist(), 0.0][index : index + steps + 1]
            run = self.runs[scheduler] = Run(
                scheduler.timesteps, begin=index, new_branch=self.policy.begin(sigmas)
            )
        return run, index


def cache_steps(pipe: Any, policy: Policy) -> tuple[Applied, StepCache]:
    """Put a step cache before the pipeline's transformer. Only this instance is changed."""
    transformer = pipe.transformer
    cache = StepCache(policy, scheduler_of(pipe))
    original_context, original_reset = transformer.cache_context, transformer._reset_stateful_cache

    @contextmanager
    def cache_context(name: str, **where: Any) -> Iterator[None]:
        before, cache.context = cache.context, name
        try:
            with original_context(name, **where):
                yield
        finally:
            cache.context = before

    def reset(recurse: bool = True) -> None:
        cache.drop()  # every Diffusers pipeline calls this at the end of its call
        original_reset(recurse)

    put_back = [
        replace_attribute(transformer, "forward", cache),
        replace_attribute(transformer, "cache_context", cache_context),
        replace_attribute(transformer, "_reset_stateful_cache", reset),
    ]

    def undo() -> None:
        for undo_one in put_back:
            undo_one()

    def live() -> str:
        return f"held at most {cache.peak_bytes / 2**20:.2f} MiB of {policy.keeps}"

    return Applied(name="cache", what=policy.describe(), undo=undo, live=live), cache


def _foreign_driver() -> CallError:
    return CallError(
        f"the transformer was called more than {MOST_CALLS_IN_STEP} times in one sampling step: "
        "another pipeline with its own scheduler is driving it",
        "make that pipeline with `fast.from_pipe(PipelineClass)` and call what it returns",
    )
