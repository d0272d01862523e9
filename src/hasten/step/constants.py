"""What stays the same over a sampling run, made at its first call and found again at the others.

The modulations depend on the timestep, the guidance scale and the pooled text. At the first call of
a run all its timesteps are known, so one product per linear makes the rows of all steps, reading
each weight once instead of once per step. Text and positions are embedded once, too.

A value belongs to a call if it was made from the very tensors that the call passes, unchanged.
Anything else is made again: other prompts, embeddings that a callback swaps or writes to, guidance
branches, another size or batch.
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

MOST = 4  # sets of constants kept of a run: conditional, unconditional, two for perturbed guidance


@dataclass(frozen=True)
class Conditioning:
    """The modulations whose rows can be made for all steps at once.

    Attributes:
        norms: Of a transformer: (name, norm) of each norm with a modulation linear, in order.
        rows: (transformer, inputs of a call, R timesteps as the forward gets them, dtype of the
            latents) -> R×D: what the modulation linears see after their activation function.
        inputs: Names of the forward's arguments that the rows depend on besides the timestep.
        timestep: The forward's argument that holds the timestep.
        per_timestep: The scheduler's timesteps are that many times the forward's.
    """

    norms: Callable[[Transformer], list[tuple[str, nn.Module]]]
    rows: Callable[[Transformer, Mapping[str, Any], Tensor, torch.dtype], Tensor]
    inputs: tuple[str, ...] = ()
    timestep: str = "timestep"
    per_timestep: float = 1000.0


@dataclass(frozen=True)
class Split:
    """Cuts a step into what a run needs once and a body, for kernels and exported engines.

    Attributes:
        inputs: Names of the forward's arguments that `embedded` reads.
        embedded: (transformer, inputs of a call) -> the body's constants besides the row, by name.
        original_only: Arguments that only the original forward takes.
    """

    inputs: tuple[str, ...]
    embedded: Callable[[Transformer, Mapping[str, Any]], dict[str, Tensor]]
    original_only: tuple[str, ...] = ()

    def beyond(self, inputs: Mapping[str, Any]) -> str | None:
        """What of a call's inputs the body cannot take; None where it takes all."""
        for name in self.original_only:
            if inputs.get(name) is not None:
                return name
        for name, value in inputs.items():
            if name.endswith("attention_kwargs") and (extra := (value or {}).keys() - {"scale"}):
                return f"{name} {', '.join(sorted(extra))}"
        return None


def no_change() -> str | None:
    """The original modules are read at every call, so they may change."""
    return None


class ConstantsLayer:
    """Makes a run's constants at its first call and hands each call those of its step.

    Args:
        transformer: Whose inputs the calls have.
        conditioning: How the modulations are conditioned.
        modulations: Whose rows the table holds.
        split: Where there is a body, what it needs besides the row and what it cannot take.
        whole_run: Whether the table has all steps' rows, or the one of the call.
        changed: What was replaced since the body was made; None if nothing.
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
        self.beyond: dict[str, int] = {}

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        if self.split is None or not self._goes_to_body(self.split, call.inputs):
            return inner(call.but(call.inputs, self._constants(call, None)))
        constants = self._constants(call, self.split)
        latents = next(iter(call.inputs))
        return inner(call.but({latents: call.inputs[latents]}, constants))

    def live(self) -> str:
        line = f"held at most {self.peak_bytes / 2**20:.1f} MiB of constants"
        beyond = "; ".join(
            f"{count} call{'s' * (count != 1)} with {argument} ran on the original blocks"
            for argument, count in self.beyond.items()
        )
        return f"{line}; {beyond}" if beyond else line

    def _goes_to_body(self, split: Split, inputs: Mapping[str, Any]) -> bool:
        argument = split.beyond(inputs)
        if argument:
            self.beyond[argument] = self.beyond.get(argument, 0) + 1
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
        known = [] if call.run is None else list(call.run.kept.get(self.name, ()))
        held = sum(tensor.nbytes for one in (*known, table) for tensor in one.kept())
        self.peak_bytes = max(self.peak_bytes, held)


class Seen:
    """The values that constants were made from, to be compared with those of later calls.

    A tensor is the same if it is the same object and has not been written to since. Small tensors,
    which some pipelines make again at each step, may also be equal. Tensors made under inference
    mode do not count writes, so they are compared by value, which waits for the device.
    """

    def __init__(self, values: Sequence[object]) -> None:
        self.kept = [_Kept(value) for value in values]

    def same(self, values: Sequence[object]) -> bool:
        """Whether these are the values of then."""
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
    """Counts writes in place; None for what does not count them."""
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version


@dataclass(frozen=True)
class Table:
    """Constants of a run.

    Attributes:
        values: By name; those that `rows` does not hold.
        rows: steps × B × width modulations from the run's step `begin` on.
        begin: The first step that it has a row for.
        seen: What it was made from.
    """

    values: Mapping[str, Tensor]
    rows: Tensor
    begin: int
    seen: Seen

    def kept(self) -> list[Tensor]:
        """Its tensors."""
        return [self.rows, *self.values.values()]

    def at(self, step: int) -> Mapping[str, Tensor] | None:
        """The constants of a step of the run; None where it has no row for it."""
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
    """The constants of a call: those of its run that were made from the same values, or new ones.

    Args:
        call: The call; outside of a run nothing is kept.
        name: Under which the run keeps them.
        given: What they are made from.
        make: Makes a table, and says whether it is good for later calls.
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
    """What the forward's timestep will be on the run's steps from this one on: steps × B.

    They are rounded as the pipeline rounds them. This reads one value back from the device.

    Returns:
        None where that does not give the call's own timestep, or outside of a run.
    """
    if call.run is None:
        return None
    given: Tensor = call.inputs[name]
    planned = call.run.timesteps[call.index :].to(given.device).to(given.dtype) / per_timestep
    planned = planned[:, None].expand(-1, len(given))
    return planned if torch.equal(planned[0], given) else None


@contextmanager
def _scaled(transformer: Transformer, scale: float) -> Iterator[None]:
    """While it lasts, LoRA layers have a call's scale, as in Diffusers' own forwards."""
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
