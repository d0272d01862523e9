"""What runs behind the constants of a run: a body of tensors only, or the original forward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hasten.step.call import Inner, Output, StepCall
from hasten.step.modulations import RowReaders

__all__ = ["Body", "BodyLayer"]


Body = Callable[..., Tensor]
"""What is left of a step once the constants of a run are made, a function of tensors only: B×S×C
latents and, by name, the `row` of the step and what `Split.embedded` gives -> the output."""


class BodyLayer:
    """Runs the body on calls that come with its constants, the original forward on the others.

    Args:
        body: None where the blocks stay as they are.
        readers: In the modulation linears.
    """

    name = "body"

    def __init__(self, body: Body | None, readers: RowReaders) -> None:
        self.body = body
        self.readers = readers

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        constants = dict(call.constants)
        row = constants.get("row")
        if row is None:
            return inner(call)
        if self.body is not None and len(constants) > 1:
            velocity = self.body(call.latents, **constants)
            return Output.of_sample(velocity, return_dict=call.return_dict)
        self.readers.attach()
        with self.readers.reading(row):
            return inner(call)

    def live(self) -> str:
        return ""
