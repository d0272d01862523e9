"""The T5 encoder's linears in eight bits: half the memory, multiplied in the activations' dtype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hasten.quantization.linear import WeightOnlyLinear, dtype_of
from hasten.quantization.schemes import SCHEMES
from hasten.step.applied import Applied, refuse_as_weights
from hasten.step.protocols import Component

WeightScheme = Literal["fp8-weight", "int8-weight"]


class FeedForwardOutput(nn.Module):
    """Replaces the last linear (`wo`) of T5's feed-forward.

    Transformers casts the activations to the dtype of `wo.weight`, which must not be that of the
    codes, so `weight` is None here.

    Args:
        linear: The quantised linear.
        dtype: The dtype to cast activations to: float32 if `wo` was kept in float32 because the
            activations of a float16 encoder overflow; None for no cast.
    """

    def __init__(self, linear: WeightOnlyLinear, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.linear = linear
        self.weight = None
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """… × K -> … × N in `dtype`, or in x's dtype."""
        output: Tensor = self.linear(x if self.dtype is None else x.to(self.dtype))
        return output


def store_in_eight_bits(encoder: Component, scheme: WeightScheme) -> Applied:
    """Replace each linear of the encoder by an eight-bit one with one scale per output channel.

    Embeddings, the relative position bias and norms are unchanged. Each original is freed when it
    is replaced, the largest first. If an error is raised after some linears were replaced, a note
    on it gives their number.
    """
    names = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    before = after = 0
    largest_first = sorted(names, key=lambda name: -encoder.get_submodule(name).weight.numel())
    for done, name in enumerate(largest_first):
        old = encoder.get_submodule(name)
        try:
            linear = WeightOnlyLinear.from_linear(old, dtype=dtype_of(SCHEMES[scheme])).train(
                old.training
            )
        except BaseException as error:
            if done:
                error.add_note(f"text: {done} linears were already replaced; load the model again")
            raise
        before, after = before + _bytes(old), after + _bytes(linear)
        _replace(encoder, name, linear, old.weight.dtype)
    refuse_as_weights(encoder)
    return Applied(
        name="text",
        description=f"{len(names)} linears of {type(encoder).__name__} in {scheme}: "
        f"{before / 2**20:.1f} → {after / 2**20:.1f} MiB",
        undo=None,
        unchanged=(("embeddings, relative position bias, norms", "few weights or no product"),),
        cannot_undo="the original weights were freed as they were replaced",
    )


def _replace(encoder: Component, name: str, linear: WeightOnlyLinear, dtype: torch.dtype) -> None:
    parent, _, own = name.rpartition(".")
    new: nn.Module = linear
    if own == "wo":
        new = FeedForwardOutput(linear, None if dtype == encoder.dtype else dtype)
    setattr(encoder.get_submodule(parent), own, new.train(linear.training))


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
