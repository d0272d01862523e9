"""The policy of every planned kind: compute when the plan says so, else combine past outputs.

No value is read back from the device in the loop. What is kept is the model's output (the
velocity), so a skipped step costs nothing but the scheduler's update.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from hasten.passes.cache.plan import Plan
from hasten.passes.cache.planner import Planner
from hasten.passes.cache.predict import combine
from hasten.passes.cache.state import Answer

__all__ = ["Planned"]


class Planned:
    """Plans each run as it begins. `forward` is the transformer's, compiled or not."""

    keeps = "outputs"

    def __init__(self, forward: Callable[..., Any], planner: Planner) -> None:
        self.forward = forward
        self.planner = planner

    def begin(self, sigmas: Sequence[float]) -> Callable[[], PlannedBranch]:
        plan = self.planner(sigmas)
        return lambda: PlannedBranch(self.forward, plan)

    def describe(self) -> str:
        return self.planner.describe()


class PlannedBranch:
    """The newest computed outputs, newest first, as many as the plan ever combines."""

    def __init__(self, forward: Callable[..., Any], plan: Plan) -> None:
        self.forward = forward
        self.plan = plan
        self.outputs: deque[Tensor] = deque(maxlen=plan.history)

    def answer(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        computed = self.plan.compute[step] or not self.outputs
        if computed:
            self.outputs.appendleft(self.forward(*args, **kwargs)[0].detach())
        return Answer(combine(self.outputs, self.plan.weights[step]), computed)

    def kept(self) -> Iterable[Tensor]:
        return self.outputs
