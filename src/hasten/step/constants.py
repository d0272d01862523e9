"""Constants of a sampling run: computed at its first call and reused at the others.

The modulations depend on the timestep, the guidance scale and the pooled text. All timesteps of a
run are known at its first call, so one product per linear computes the rows of all steps and reads
each weight once per run instead of once per step. Text and positions are embedded once, too.

Constants are reused if a call passes the same, unmodified tensors that they were computed from.
They are computed again for other prompts, embeddings that a callback replaces or writes to,
guidance branches, or another size or batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import CallError
from hasten.step.call import Inner, Output, StepCall
from hasten.step.modulations import Modulations, RowReaders
from hasten.step.protocols import Transformer

MOST = 4  # sets of constants per run: conditional, unconditional, two for perturbed guidance


@dataclass(frozen=True)
class Conditioning:
    """How a family's modulations are conditioned, so that all steps can be computed at once.

    Attributes:
        norms: Returns a transformer's (name, norm) pairs, in order; each norm has a modulation
            linear.
        rows: (transformer, inputs of a call, R timesteps of the forward, dtype of the latents) ->
            R×D conditioning vectors, before the activation function of the modulations.
        inputs: Names of the forward's arguments that the rows depend on, besides the timestep.
        timestep: Name of the forward's timestep argument.
        per_timestep: Ratio of the scheduler's timesteps to the forward's.
    """

    norms: Callable[[Transformer], list[tuple[str, nn.Module]]]
    rows: Callable[[Transformer, Mapping[str, Any], Tensor, torch.dtype], Tensor]
    inputs: tuple[str, ...] = ()
    timestep: str = "timestep"
    per_timestep: float = 1000.0


@dataclass(frozen=True)
class Split:
    """Splits a step into constants of the run and a body, for kernels and exported engines.

    Attributes:
        inputs: Names of the forward's arguments that `embedded` reads.
        embedded: (transformer, inputs of a call) -> the body's constants by name, without the row.
        original_only: Arguments that only the original forward supports.
    """

    inputs: tuple[str, ...]
    embedded: Callable[[Transformer, Mapping[str, Any]], dict[str, Tensor]]
    original_only: tuple[str, ...] = ()

    def unsupported(self, inputs: Mapping[str, Any]) -> str | None:
        """The first input of a call that the body does not support; None if it supports all."""
        for name in self.original_only:
            if inputs.get(name) is not None:
                return name
        for name, value in inputs.items():
            if name.endswith("attention_kwargs") and (extra := (value or {}).keys() - {"scale"}):
                return f"{name} {', '.join(sorted(extra))}"
        return None


def no_change() -> str | None:
    """Always None: the original modules are read at every call, so they may change."""
    return None


class ConstantsLayer:
    """Computes a run's constants at its first call and passes each call the constants of its step.

    Args:
        transformer: The transformer.
        conditioning: How its modulations are conditioned.
        modulations: The modulations in the table.
        split: The body's further constants and unsupported inputs; None without a body.
        whole_run: Whether the table has the rows of all steps or only that of the call.
        changed: Returns the part that was replaced since the body was built; None if none was.
    """

    name = "constants"

    def __init__(
        self,
        transformer: Transformer,
        conditioning: Conditioning,
        modulations: Modulations,
        split: Split | None,
        *,
        whole_run: bool = True,
        changed: Callable[[], str | None] = no_change,
    ) -> None:
        self.transformer = transformer
        self.conditioning = conditioning
        self.modulations = modulations
        self.split = split
        self.whole_run = whole_run
        self.changed = changed
        self.made = 0
        self.peak_bytes = 0
        self.unsupported: dict[str, int] = {}

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        if self.split is None or not self._goes_to_body(self.split, call.inputs):
            return inner(call.but(call.inputs, self._constants(call, None)))
        constants = self._constants(call, self.split)
        latents = next(iter(call.inputs))
        return inner(call.but({latents: call.inputs[latents]}, constants))

    def live(self) -> str:
        line = f"held at most {self.peak_bytes / 2**20:.1f} MiB of constants"
        fallbacks = "; ".join(
            f"{count} call{'s' * (count != 1)} with {argument} ran on the original blocks"
            for argument, count in self.unsupported.items()
        )
        return f"{line}; {fallbacks}" if fallbacks else line

    def _goes_to_body(self, split: Split, inputs: Mapping[str, Any]) -> bool:
        argument = split.unsupported(inputs)
        if argument:
            self.unsupported[argument] = self.unsupported.get(argument, 0) + 1
        return not argument

    def _constants(self, call: StepCall, split: Split | None) -> Mapping[str, Tensor]:
        timestep: Tensor = call.inputs[self.conditioning.timestep]
        names = dict.fromkeys((*self.conditioning.inputs, *(split.inputs if split else ())))
        given = [
            split is None,
            timestep.dtype,
            len(timestep),
            call.lora_scale,
            *(call.inputs.get(name) for name in names),
        ]
        return constants_of(call, self.name, given, partial(self._make, call, split, given))

    def _make(
        self, call: StepCall, split: Split | None, given: Sequence[object]
    ) -> tuple[Table, bool]:
        if split is not None and (fault := self.changed()):
            raise CallError(
                f"{fault} was replaced after the pipeline was optimised",
                "restore() the pipeline, change it (load and fuse LoRA weights), optimise it again",
            )
        conditioning = self.conditioning
        timesteps = None
        if self.whole_run:
            timesteps = timesteps_of(call, conditioning.timestep, conditioning.per_timestep)
        lasting = timesteps is not None
        if timesteps is None:
            timesteps = call.inputs[conditioning.timestep][None]
        steps, batch = timesteps.shape
        dtype = call.latents.dtype
        with _scaled(self.transformer, call.lora_scale):
            seen = conditioning.rows(self.transformer, call.inputs, timesteps.flatten(), dtype)
            rows = self.modulations.rows(seen).view(steps, batch, -1)
        values = {} if split is None else split.embedded(self.transformer, call.inputs)
        table = Table(values, rows, call.step, Seen(given))
        self._count(call, table)
        return table, lasting

    def _count(self, call: StepCall, table: Table) -> None:
        self.made += 1
        tables = [] if call.run is None else list(call.run.kept.get(self.name, ()))
        held = sum(tensor.nbytes for one in (*tables, table) for tensor in one.kept())
        self.peak_bytes = max(self.peak_bytes, held)


class Seen:
    """The values that constants were computed from, for comparison with those of later calls.

    A tensor matches if it is the same object and has not been written to since. Small tensors,
    which some pipelines create at each step, may also match by value. Tensors created under
    inference mode do not count writes, so they are compared by value, which waits for the device.
    """

    def __init__(self, values: Sequence[object]) -> None:
        self.kept = [_Kept(value) for value in values]

    def same(self, values: Sequence[object]) -> bool:
        """Whether these values match the recorded ones."""
        return all(kept.same(value) for kept, value in zip(self.kept, values, strict=True))


class _Kept:
    def __init__(self, value: object) -> None:
        self.value = value
        self.version = _version(value)
        by_value = isinstance(value, Tensor) and (value.ndim <= 1 or self.version is None)
        self.copy = value.clone() if isinstance(value, Tensor) and by_value else None

    def same(self, value: object) -> bool:
        if not isinstance(value, Tensor):
            return not isinstance(self.value, Tensor) and self.value == value
        if value is self.value and self.version is not None and value._version == self.version:
            return True
        if self.copy is None or (value.ndim > 1 and value is not self.value):
            return False
        return self.copy.shape == value.shape and torch.equal(self.copy, value)


def _version(value: object) -> int | None:
    """Torch's count of in-place writes; None for values without one."""
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version


@dataclass(frozen=True)
class Table:
    """Constants of a run.

    Attributes:
        values: The constants other than the rows, by name.
        rows: Modulations from the run's step `begin` on, steps × B × width.
        begin: The first step with a row.
        seen: The values that the table was computed from.
    """

    values: Mapping[str, Tensor]
    rows: Tensor
    begin: int
    seen: Seen

    def kept(self) -> list[Tensor]:
        """Its tensors."""
        return [self.rows, *self.values.values()]

    def at(self, step: int) -> Mapping[str, Tensor] | None:
        """The constants of a step of the run; None without a row for it."""
        place = step - self.begin
        if not 0 <= place < len(self.rows):
            return None
        return {"row": self.rows[place], **self.values}


def constants_of(
    call: StepCall,
    name: str,
    given: Sequence[object],
    make: Callable[[], tuple[Table, bool]],
) -> Mapping[str, Tensor]:
    """Return the constants of a call: those computed from the same values in its run, or new ones.

    Args:
        call: The call; outside a run, nothing is kept.
        name: The key of the constants in the run.
        given: The values that they are computed from.
        make: Computes a table; also returns whether later calls may use it.
    """
    kept: deque[Table] = deque(maxlen=MOST)
    if call.run is not None:
        kept = call.run.kept.setdefault(name, kept)
    for table in kept:
        if table.seen.same(given) and (values := table.at(call.step)) is not None:
            return values
    table, lasting = make()
    if lasting:
        kept.append(table)
    values = table.at(table.begin)
    assert values is not None
    return values


def timesteps_of(call: StepCall, name: str, per_timestep: float) -> Tensor | None:
    """Predict the forward's timesteps on this and all later steps of the run.

    They are rounded as the pipeline rounds them. The check reads one value back from the device.

    Args:
        call: The call.
        name: Name of the forward's timestep argument.
        per_timestep: Ratio of the scheduler's timesteps to the forward's.

    Returns:
        Timesteps, steps × B. None outside a run, or if they disagree with the call's own timestep.
    """
    if call.run is None:
        return None
    given: Tensor = call.inputs[name]
    planned = call.run.timesteps[call.index :].to(given.device).to(given.dtype) / per_timestep
    planned = planned[:, None].expand(-1, len(given))
    return planned if torch.equal(planned[0], given) else None


@contextmanager
def _scaled(transformer: Transformer, scale: float) -> Iterator[None]:
    """Set the scale of LoRA layers inside the context, as Diffusers' own forwards do."""
    if scale == 1.0 or not getattr(transformer, "_hf_peft_config_loaded", False):
        yield
        return
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(transformer, scale)
    try:
        yield
    finally:
        unscale_lora_layers(transformer, scale)


Body = Callable[..., Tensor]
"""A step without its constants, a function of tensors only: (latents B×S×C; by name, the `row` of
the step and the tensors of `Split.embedded`) -> the output."""


class BodyLayer:
    """Runs the body on calls with its constants, and the original forward on all others.

    Args:
        body: The body; None if the blocks are unchanged.
        readers: The readers in the modulation linears.
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
