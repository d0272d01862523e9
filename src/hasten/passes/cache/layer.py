"""The step cache: a layer whose policy decides what each transformer call returns.

Decisions are made outside compiled code and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torch import Tensor

from hasten.passes.cache.plan import Planner
from hasten.step.applied import Applied
from hasten.step.call import Inner, Output, StepCall
from hasten.step.chain import StepChain
from hasten.step.run import outside_of_a_run


class Branch(Protocol):
    """One sequence of transformer calls within a run, e.g. `cond` or `uncond`."""

    def output_of(self, call: StepCall, inner: Inner) -> Output:
        """Return the output of a call; the first call is always computed.

        The stored tensors change only after the call has succeeded.
        """

    def kept(self) -> Iterable[Tensor]:
        """The tensors held for later steps."""


class Policy(Protocol):
    """Decides which transformer calls are computed and how the others are filled.

    Attributes:
        stores: The kind of tensors stored for later steps, as a word for the summary.
        planner: Plans a run before it starts; None for policies that do not plan.
    """

    stores: str

    @property
    def planner(self) -> Planner | None: ...

    def begin(self, sigmas: Sequence[float]) -> Callable[[], Branch]:
        """Begin a run.

        Args:
            sigmas: The run's N noise levels and its end, N + 1 falling values.

        Returns:
            A factory for the branches of the run, called at a branch's first call.
        """

    def describe(self) -> str:
        """One line for the summary."""

    def remove(self) -> None:
        """Restore the transformer."""


@dataclass
class Branches:
    """The branches of one run."""

    new: Callable[[], Branch]
    known: dict[Hashable, Branch] = field(default_factory=dict)

    def of(self, key: Hashable) -> Branch:
        if key not in self.known:
            self.known[key] = self.new()
        return self.known[key]

    def kept(self) -> Iterable[Tensor]:
        return [tensor for branch in self.known.values() for tensor in branch.kept()]


class CacheLayer:
    """Applies the policy and counts computed calls and stored bytes.

    Attributes:
        peak_bytes: The most bytes held for a run at any time.
    """

    name = "cache"

    def __init__(self, policy: Policy, chain: StepChain) -> None:
        self.policy = policy
        self.chain = chain
        self.peak_bytes = 0

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        run = call.run
        if run is None:
            raise outside_of_a_run(self.chain.driving())
        if self.name not in run.kept:
            run.kept[self.name] = Branches(self.policy.begin(run.sigmas))
        branches: Branches = run.kept[self.name]
        output = branches.of(call.branch).output_of(call, inner)
        if output.computed:
            run.stored += 1
            total = sum(tensor.nbytes for tensor in branches.kept())
            self.peak_bytes = max(self.peak_bytes, total)
        return output

    def live(self) -> str:
        return f"held at most {self.peak_bytes / 2**20:.2f} MiB of {self.policy.stores}"


def cache_steps(chain: StepChain, policy: Policy) -> Applied:
    """Put a step cache in front of a transformer."""
    layer = CacheLayer(policy, chain)
    chain.push(layer)
    return Applied(
        name="cache",
        description=policy.describe(),
        undo=partial(_undo, chain, policy),
        live=layer.live,
    )


def _undo(chain: StepChain, policy: Policy) -> None:
    chain.remove(CacheLayer.name)
    policy.remove()
