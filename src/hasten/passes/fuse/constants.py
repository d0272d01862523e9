"""What stays the same over a sampling run: the conditioning table, text and rotary embeddings.

The modulations depend on the timestep, the guidance scale and the pooled text. At the first call of
a run all its timesteps are known, so one product a linear makes the rows of all steps (`table`),
reading each weight once instead of once a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import CallError
from hasten.families.family import Family
from hasten.families.modulations import Modulations
from hasten.step.scheduler import driving, step_of

__all__ = ["Constants", "ConstantsOfRuns"]

BRANCHES = 4  # conditional, unconditional, and two more for perturbed guidance


@dataclass(frozen=True)
class Constants:
    """table: steps × B × width modulations from the run's step `begin` on; text: B×T×D; cos, sin:
    (T+S) × head_dim; timesteps: the scheduler's; of: the inputs that they were made from."""

    table: Tensor
    begin: int
    text: Tensor
    cos: Tensor
    sin: Tensor
    timesteps: Tensor | None
    of: tuple[Any, ...]

    @property
    def bytes(self) -> int:
        tensors = self.table, self.text, self.cos, self.sin
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class ConstantsOfRuns:
    """Makes constants at a run's first call and finds them again at its other calls.

    A call belongs to what has been made from the very tensors it passes (guidance, which some
    pipelines make anew at each step, may also be equal). Anything else is made anew: changed
    prompts, callbacks that swap embeddings, guidance branches, another size or batch. Without
    `whole_run`, and for calls outside of a run, a table has the one row of the call.
    """

    def __init__(
        self,
        transformer: Any,
        family: Family,
        modulations: Modulations,
        home: Callable[[], Any],
        *,
        whole_run: bool = True,
    ) -> None:
        self.transformer = transformer
        self.family = family
        self.modulations = modulations
        self.home = home
        self.whole_run = whole_run
        self.known: deque[Constants] = deque(maxlen=BRANCHES)
        self.made = 0
        self.peak_bytes = 0

    def at(self, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Constants, Tensor]:
        """The constants that a call's inputs belong to, and its row, B×width."""
        timesteps, step = self._step()
        given = _identity(inputs)
        for constants in self.known:
            if constants.timesteps is timesteps and timesteps is not None:
                step_there = step - constants.begin
                if 0 <= step_there < len(constants.table) and _same(constants.of, given):
                    return constants, constants.table[step_there]
        constants = self._make(inputs, given, timesteps, step, dtype)
        return constants, constants.table[0]

    def drop(self) -> None:
        """Forget all runs."""
        self.known.clear()

    def _step(self) -> tuple[Tensor | None, int]:
        """The running scheduler's timesteps and step; none outside of a run."""
        if not self.whole_run:
            return None, 0
        scheduler = driving(self.home)
        try:
            return scheduler.timesteps, step_of(scheduler)
        except CallError:
            return None, 0

    def _make(
        self,
        inputs: dict[str, Any],
        given: tuple[Any, ...],
        timesteps: Tensor | None,
        step: int,
        dtype: torch.dtype,
    ) -> Constants:
        moments = _moments(inputs["timestep"], timesteps, step)
        if moments is None:  # not the step the scheduler stands at: good for this call alone
            timesteps, moments = None, inputs["timestep"][None]
        steps, batch = moments.shape
        pooled, guidance = inputs["pooled_projections"], inputs.get("guidance")
        conditioning = self.family.conditioning(
            self.transformer,
            moments.flatten(),
            None if guidance is None else guidance.expand(batch).repeat(steps),
            pooled.expand(batch, -1).repeat(steps, 1),
            dtype,
        )
        cos, sin = self.family.rotary(self.transformer, inputs["txt_ids"], inputs["img_ids"])
        constants = Constants(
            table=self.modulations.rows(conditioning).view(steps, batch, -1),
            begin=step,
            text=self.transformer.context_embedder(inputs["encoder_hidden_states"]),
            cos=cos,
            sin=sin,
            timesteps=timesteps,
            of=given,
        )
        self.made += 1
        if timesteps is not None:
            if self.known and self.known[0].timesteps is not timesteps:
                self.known.clear()  # of an earlier run
            self.known.append(constants)
        self.peak_bytes = max(self.peak_bytes, sum(known.bytes for known in self.known))
        return constants


def _moments(timestep: Tensor, timesteps: Tensor | None, step: int) -> Tensor | None:
    """All timesteps from `step` on, steps × B in [0, 1], rounded as the pipeline rounds them.

    None where the call's own timestep is not what that gives for `step`. This reads one value back
    from the device, once a run.
    """
    if timesteps is None:
        return None
    moments = timesteps[step:].to(timestep.device).to(timestep.dtype) / 1000
    moments = moments[:, None].expand(-1, len(timestep))
    return moments if torch.equal(moments[0], timestep) else None


def _identity(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What the constants depend on: tensors, as they are now, and the scale of LoRA layers."""
    tensors = [
        inputs[name]
        for name in ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids")
    ]
    scale = (inputs.get("joint_attention_kwargs") or {}).get("scale")
    versions = [(tensor, _version(tensor)) for tensor in tensors]
    return (
        inputs["timestep"].dtype,
        len(inputs["timestep"]),
        scale,
        versions,
        inputs.get("guidance"),
    )


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    *plain, versions, guidance = one
    *plain_there, versions_there, guidance_there = other
    return (
        plain == plain_there
        and all(
            tensor is there and version == version_there
            for (tensor, version), (there, version_there) in zip(
                versions, versions_there, strict=True
            )
        )
        and _equal(guidance, guidance_there)
    )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


def _version(tensor: Tensor) -> int:
    """Counts changes in place; tensors made under inference mode are not counted."""
    return 0 if tensor.is_inference() else tensor._version
