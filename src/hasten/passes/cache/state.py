"""The state of one sampling run: made at its first transformer call, dropped at its end."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

__all__ = ["Answer", "Branch", "Run", "RunCounts"]


@dataclass(frozen=True)
class RunCounts:
    """What a finished (or interrupted) run did.

    steps: sampling steps entered; computed: of these, steps on which the whole transformer ran for
    any branch; skipped: the others; stored: calls of which something was kept for later steps, over
    all branches.
    """

    steps: int = 0
    computed: int = 0
    skipped: int = 0
    stored: int = 0


class Answer(NamedTuple):
    """What a transformer call returns, and whether the whole transformer ran for it."""

    output: Tensor
    computed: bool


class Branch(Protocol):
    """One stream of transformer calls within a run, e.g. `cond` or `uncond`, and what it keeps."""

    def answer(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        """Answer the call of `step` (0 is the run's first), given the forward's arguments. The
        first call is computed. What is kept changes only once the call has succeeded."""

    def kept(self) -> Iterable[Tensor]:
        """The tensors held for later steps."""


@dataclass
class Run:
    """One pass over `scheduler.timesteps`.

    The step is read off the scheduler, never counted, so guidance branches, interrupts and late
    starts (img2img) cannot put it out of step. `timesteps` identifies the run: every call of
    `set_timesteps` makes a new tensor.
    """

    timesteps: Tensor
    begin: int
    new_branch: Callable[[], Branch]
    branches: dict[Hashable, Branch] = field(default_factory=dict)
    index: int = -1
    calls_in_step: dict[Hashable, int] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    computed: set[int] = field(default_factory=set)
    stored: int = 0

    def enter(self, index: int, caller: Hashable) -> Branch:
        """Note a transformer call at scheduler index `index`; return the branch it belongs to.

        Pipelines name their branches through `cache_context` or not at all; unnamed calls of one
        step are told apart by their order.
        """
        if index != self.index:
            self.index = index
            self.calls_in_step.clear()
        order = self.calls_in_step.get(caller, 0)
        self.calls_in_step[caller] = order + 1
        self.entered.add(index)
        key = (caller, order)
        if key not in self.branches:
            self.branches[key] = self.new_branch()
        return self.branches[key]

    def answer(self, branch: Branch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the branch answers now, after counting whether it computed."""
        output, computed = branch.answer(self.index - self.begin, args, kwargs)
        if computed:
            self.computed.add(self.index)
            self.stored += 1
        return output

    def counts(self) -> RunCounts:
        """Steps entered, computed and skipped so far."""
        return RunCounts(
            steps=len(self.entered),
            computed=len(self.computed),
            skipped=len(self.entered - self.computed),
            stored=self.stored,
        )

    def bytes_held(self) -> int:
        """Memory of what the branches keep."""
        return sum(
            value.numel() * value.element_size()
            for branch in self.branches.values()
            for value in branch.kept()
        )
