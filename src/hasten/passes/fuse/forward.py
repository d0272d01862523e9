"""The transformer's forward in two halves: what a run needs once, and what every step needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hasten.errors import CallError
from hasten.families.family import Family
from hasten.models.answer import answer
from hasten.passes.applied import replace_attribute
from hasten.passes.fuse.constants import ConstantsOfRuns

__all__ = ["Body", "FusedForward"]

Body = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(latents, embedded text, modulation row, cos, sin) -> velocity; tensors only, so that it can be
captured as a CUDA graph."""

NOT_IN_THE_BODY = (
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


class FusedForward:
    """Called in place of the transformer's forward, with its arguments and its result.

    What the body cannot take (ControlNet residuals, IP-Adapter embeddings) goes to the `original`
    forward, and `declined` says so. `changed` answers what happened to the weights since, if
    anything.
    """

    def __init__(
        self,
        transformer: Any,
        family: Family,
        constants: ConstantsOfRuns,
        body: Body,
        original: Callable[..., Any],
        changed: Callable[[], str | None],
    ) -> None:
        self.transformer = transformer
        self.family = family
        self.constants = constants
        self.body = body
        self.original = original
        self.changed = changed
        self.declined: dict[str, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.family.inputs(self.transformer, args, kwargs)
        if reason := _beyond(inputs):
            if self.constants.modulations.device != inputs["hidden_states"].device:
                raise CallError(
                    f"the fused forward cannot take {reason}, and the original one has no "
                    "modulation weights on the GPU",
                    'leave [offload] out of the recipe, or its kind = "modulation"',
                )
            self.declined[reason] = self.declined.get(reason, 0) + 1
            return self.original(*args, **kwargs)
        velocity = self.family.scaled(self.transformer, self._step, inputs)
        return answer(velocity, kwargs)

    def put_in_place(self) -> Callable[[], None]:
        """Become the transformer's forward, and free the constants when a pipeline's call ends,
        which it tells the transformer. Returns what undoes it."""
        original = self.transformer._reset_stateful_cache

        def reset(recurse: bool = True) -> None:
            self.constants.drop()
            original(recurse)

        undo_reset = replace_attribute(self.transformer, "_reset_stateful_cache", reset)
        undo_forward = replace_attribute(self.transformer, "forward", self)

        def undo() -> None:
            self.constants.drop()
            undo_reset()
            undo_forward()

        return undo

    def _step(self, transformer: Any, **inputs: Any) -> Tensor:
        latents = inputs["hidden_states"]
        made = self.constants.made
        constants, row = self.constants.at(inputs, latents.dtype)
        if self.constants.made > made and (fault := self.changed()):
            self.constants.drop()
            raise CallError(
                f"{fault} was replaced after the pipeline was optimised",
                "restore() the pipeline, change it (load and fuse LoRA weights), optimise it again",
            )
        return self.body(latents, constants.text, row, constants.cos, constants.sin)


def _beyond(inputs: dict[str, Any]) -> str | None:
    """What of these inputs the body cannot take."""
    for name in NOT_IN_THE_BODY:
        if inputs.get(name) is not None:
            return name
    extra = sorted((inputs.get("joint_attention_kwargs") or {}).keys() - {"scale"})
    return f"joint_attention_kwargs {', '.join(extra)}" if extra else None
