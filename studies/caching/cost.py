"""The cost of a run: multiply-adds inside the transformer, counted as they are executed.

A cache's skipped step is seldom free (embedders, a first block for the decision, output layers).
The cost is therefore arithmetic instead of steps: every linear layer and every attention that
PyTorch executes inside the transformer. Norms, activations, Fourier transforms and a predictor's
element-wise sums are not counted; wall time includes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Meter", "Unit", "metered"]

FULL = 0.95
"""A transformer call of at least this share of a full one counts as computed."""


class _Counter:
    """Adds up the multiply-adds of linear layers and attention inside a `with` block.

    The two functions are wrapped in `torch.nn.functional`, where modules look them up: a function
    mode would slow every other operation too, and a small step on a GPU would take twice as long.
    """

    def __init__(self) -> None:
        self.total = 0

    def __enter__(self) -> _Counter:
        linear, attention = self._originals = F.linear, F.scaled_dot_product_attention

        def counted_linear(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.total += linear_madds(input, weight)
            return linear(input, weight, *args, **kwargs)

        def counted_attention(
            query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Tensor:
            self.total += attention_madds(query, key, value)
            return attention(query, key, value, *args, **kwargs)

        F.linear, F.scaled_dot_product_attention = counted_linear, counted_attention
        return self

    def __exit__(self, *_: object) -> None:
        F.linear, F.scaled_dot_product_attention = self._originals


def linear_madds(inputs: Tensor, weight: Tensor) -> int:
    """inputs: ... × in; weight: out × in."""
    return inputs.numel() * weight.shape[0]


def attention_madds(query: Tensor, key: Tensor, value: Tensor) -> int:
    """query: ... × L × d; key: ... × S × d; value: ... × S × e."""
    return query.numel() * key.shape[-2] + math.prod(query.shape[:-1]) * math.prod(value.shape[-2:])


@dataclass
class Meter:
    """Multiply-adds of each call of a transformer, in order, each divided by its batch size."""

    calls: list[float] = field(default_factory=list)

    def take(self) -> list[float]:
        """The calls since the last `take`."""
        calls, self.calls = self.calls, []
        return calls


@dataclass(frozen=True)
class Unit:
    """One evaluation: the cost per image of one step of the plain pipeline.

    madds: its multiply-adds; branches: transformer calls in it (two under true CFG); partial: what
    a call that leaves early is charged of its own arithmetic. Where blocks are alike, a model of
    B blocks pays for one block what b/B of it is in a model of b.
    """

    madds: float
    branches: int
    partial: float = 1.0

    @classmethod
    def of(cls, one_step: list[float]) -> Unit:
        """From the calls of a plain run of one step."""
        return cls(sum(one_step), len(one_step))

    def evaluations(self, calls: list[float]) -> float:
        """Cost of a run in evaluations."""
        full = self._full()
        return sum(call if call >= full else self.partial * call for call in calls) / self.madds

    def computed(self, calls: list[float]) -> float:
        """Number of steps of a run in which (nearly) the whole transformer ran."""
        full = self._full()
        return sum(call >= full for call in calls) / self.branches

    def _full(self) -> float:
        return FULL * self.madds / self.branches


@contextmanager
def metered(transformer: nn.Module) -> Iterator[Meter]:
    """Record every call of this transformer, even if its forward is replaced."""
    meter = Meter()
    counters: list[_Counter] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        counters.append(_Counter())
        counters[-1].__enter__()

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        counter = counters.pop()
        counter.__exit__()
        latents = args[0] if args else kwargs["hidden_states"]
        meter.calls.append(counter.total / latents.shape[0])

    handles = [
        transformer.register_forward_pre_hook(enter, with_kwargs=True),
        transformer.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()
        while counters:  # a call that raised
            counters.pop().__exit__()
