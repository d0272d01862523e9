"""The state of one sampling run: made at its first transformer call, dropped at its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from hasten.passes.cache.plan import Plan
from hasten.passes.cache.predict import combine

__all__ = ["Branch", "Run", "RunCounts"]


@dataclass(frozen=True)
class RunCounts:
    """What a finished (or interrupted) run did.

    steps: sampling steps entered; computed: of these, steps on which the transformer ran for any
    branch; skipped: the others; stored: outputs kept for later steps, over all branches.
    """

    steps: int = 0
    computed: int = 0
    skipped: int = 0
    stored: int = 0


@dataclass
class Branch:
    """One stream of transformer calls, e.g. `cond` or `uncond`: its computed outputs, newest
    first."""

    outputs: deque[Tensor]


@dataclass
class Run:
    """One pass over `scheduler.timesteps`.

    The step is read off the scheduler, never counted, so guidance branches, interrupts and late
    starts (img2img) cannot put it out of step. `timesteps` identifies the run: every call of
    `set_timesteps` makes a new tensor.
    """

    timesteps: Tensor
    begin: int
    plan: Plan
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
            self.branches[key] = Branch(deque(maxlen=self.plan.history))
        return self.branches[key]

    def computes(self, branch: Branch) -> bool:
        """Whether the transformer runs now. A branch's first call always computes."""
        return self.plan.compute[self.index - self.begin] or not branch.outputs

    def store(self, branch: Branch, output: Tensor) -> None:
        """Keep a computed output for the steps to come."""
        branch.outputs.appendleft(output.detach())
        self.computed.add(self.index)
        self.stored += 1

    def velocity(self, branch: Branch) -> Tensor:
        """What this step uses: known outputs, combined as the plan says."""
        return combine(branch.outputs, self.plan.weights[self.index - self.begin])

    def counts(self) -> RunCounts:
        """Steps entered, computed and skipped so far."""
        return RunCounts(
            steps=len(self.entered),
            computed=len(self.computed),
            skipped=len(self.entered - self.computed),
            stored=self.stored,
        )

    def bytes_held(self) -> int:
        """Memory of the stored outputs."""
        return sum(
            value.numel() * value.element_size()
            for branch in self.branches.values()
            for value in branch.outputs
        )
