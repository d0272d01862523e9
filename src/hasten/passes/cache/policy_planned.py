"""The policy of all planned kinds: compute the planned steps, combine past outputs on the others.

No value is read back from the device in the loop. The model's outputs (velocities) are kept, so a
skipped step costs only the combination and the scheduler's update.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor

from hasten.passes.cache.plan import Planner, StepPlan
from hasten.passes.cache.predict import combine
from hasten.step.call import Inner, Output, StepCall


class PlannedPolicy:
    """Plans each run when it begins."""

    stores = "outputs"

    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    def begin(self, sigmas: Sequence[float]) -> Callable[[], PlannedBranch]:
        return partial(PlannedBranch, self.planner(sigmas))

    def describe(self) -> str:
        return self.planner.describe()

    def remove(self) -> None:
        """Do nothing: the policy changes nothing outside the chain."""


class PlannedBranch:
    """Keeps the newest computed outputs, newest first, as many as the plan combines at most."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.outputs: deque[Output] = deque(maxlen=plan.history)

    def output_of(self, call: StepCall, inner: Inner) -> Output:
        computed = self.plan.compute[call.step] or not self.outputs
        if computed:
            self.outputs.appendleft(inner(call).detached())
        weights = self.plan.weights[call.step]
        columns = zip(*(output.tensors for output in self.outputs), strict=True)
        return self.outputs[0].but(
            [combine(column, weights) for column in columns], computed=computed
        )

    def kept(self) -> Iterable[Tensor]:
        return [tensor for output in self.outputs for tensor in output.tensors]
