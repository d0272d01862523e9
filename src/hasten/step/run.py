"""The state of one sampling run: made at its first transformer call, dropped at its end."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hasten.errors import CallError
from hasten.step.protocols import Scheduler

__all__ = ["Run", "RunCounts"]


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
