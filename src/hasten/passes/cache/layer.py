"""The step cache: a layer that asks a policy what each transformer call returns.

A decision is made outside of compiled code and CUDA graphs.
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
    """One stream of transformer calls within a run, e.g. `cond` or `uncond`."""

    def output_of(self, call: StepCall, inner: Inner) -> Output:
        """What a call returns; its first call is computed. What is kept changes only once the call
        has succeeded."""

    def kept(self) -> Iterable[Tensor]:
        """The tensors held for later steps."""


class Policy(Protocol):
    """How the calls of a transformer are answered.

    Attributes:
        stores: What it stores for later steps, as a word for the summary.
        planner: What plans a run before it starts, where anything does.
    """

    stores: str

    @property
    def planner(self) -> Planner | None: ...

    def begin(self, sigmas: Sequence[float]) -> Callable[[], Branch]:
        """Begin a run over N falling noise levels and its end (N + 1 entries).

        Returns:
            What makes a branch of it, at the branch's first call.
        """

    def describe(self) -> str:
        """One line for the summary."""

    def remove(self) -> None:
        """Leave the transformer as it was."""


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
    """Asks the policy; counts what is computed and kept.

    Attributes:
        peak_bytes: Most bytes that were kept of a run at once.
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
            held = sum(tensor.nbytes for tensor in branches.kept())
            self.peak_bytes = max(self.peak_bytes, held)
        return output

    def live(self) -> str:
        return f"held at most {self.peak_bytes / 2**20:.2f} MiB of {self.policy.stores}"


def cache_steps(chain: StepChain, policy: Policy) -> Applied:
    """Put a step cache before a transformer."""
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
