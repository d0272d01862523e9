"""The policy of kind `residual`: run the first blocks, and the others only where it matters.

With H_0 the image tokens before the first block, H_n those after the n-th and H_L those after the
last, the first blocks' residual is r = H_n − H_0. Where it is near that of the last computed step,

    mean|r − r_ref| / mean|r_ref| < threshold    (L1 means over tokens and channels, per image),

the other blocks are skipped, and what they added then, H_L − H_n, is added to the H_n of now. The
embedders, the first blocks and the output layers see the current step.

Sources: TeaCache (arXiv:2411.19108) tells from an early signal how much the output will change;
FBCache (ParaAttention, github.com/chengzeyi/ParaAttention) takes the first block's residual for
that signal; DBCache (cache-dit) takes n blocks, a warm-up and a limit of steps skipped in a row,
and can extrapolate what is added. They compare means over a whole batch; here a batch skips only if
each of its images would.

The decision is the host's: each call that may skip waits for the device, once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.passes.cache.predict import WEIGHTS, combine
from hasten.passes.cache.state import Answer
from hasten.recipe import ResidualCache

__all__ = ["Residual", "Split", "relative_change"]

NO_LIMIT = 1000  # no run has more steps


class Split(Protocol):
    """A model family that can run its transformer block by block.

    A state is a dataclass whose field `image` holds the image tokens, B×S×D.
    """

    def through(
        self,
        transformer: Any,
        middle: Callable[[Any], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The transformer's output with `middle` (state to state) in place of its blocks."""

    def blocks(self, transformer: Any, state: Any) -> Iterator[tuple[str, Any]]:
        """Run the blocks one by one, yielding (block name, state after it)."""


class Residual:
    """Decides from what the first blocks add. Nothing is planned, so there is no planner."""

    keeps = "residuals"
    planner = None

    def __init__(self, cache: ResidualCache, transformer: Any, split: Split) -> None:
        self.cache = cache
        self.transformer = transformer
        self.split = split

    def begin(self, sigmas: Sequence[float]) -> Callable[[], ResidualBranch]:
        return lambda: ResidualBranch(self, sigmas)

    def describe(self) -> str:
        cache = self.cache
        first = "block" if cache.first_blocks == 1 else f"{cache.first_blocks} blocks"
        most = cache.max_consecutive
        limit = "" if most >= NO_LIMIT else f" or {most} in a row were skipped"
        return (
            f"computes the first {cache.warmup_steps} steps, then the first {first} of each; the "
            f"other blocks only where what the first {first} added has changed by "
            f"{cache.threshold:g} or more since they last ran (relative L1, any image of a batch)"
            f"{limit}; {cache.predictor} of what they added on the other steps; each decision "
            "waits for the device"
        )


class ResidualBranch:
    """What the last computed steps added to the image tokens, B×S×D each.

    reference: the first blocks, at the last computed step; rests: the other blocks, newest first,
    one (`reuse`) or two (`linear`) of them, computed at noise levels `known`; skipped: steps in a
    row, up to now.
    """

    def __init__(self, policy: Residual, sigmas: Sequence[float]) -> None:
        self.policy = policy
        self.cache = policy.cache
        self.sigmas = sigmas
        history = 1 if self.cache.predictor == "reuse" else 2
        self.reference: Tensor | None = None
        self.rests: deque[Tensor] = deque(maxlen=history)
        self.known: deque[float] = deque(maxlen=history)
        self.skipped = 0

    def answer(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        split, transformer = self.policy.split, self.policy.transformer
        added: tuple[Tensor, Tensor] | None = None

        def middle(start: Any) -> Any:
            nonlocal added
            blocks = split.blocks(transformer, start)
            first = _after(islice(blocks, self.cache.first_blocks))
            change = first.image - start.image
            if self._skips(step, change):
                return replace(first, image=first.image + self._predicted(step))
            end = _after(blocks)
            added = change.detach(), (end.image - first.image).detach()
            return end

        output = split.through(transformer, middle, args, kwargs)
        if added is None:
            self.skipped += 1
        else:
            self._keep(step, *added)
        return Answer(output, added is not None)

    def kept(self) -> Iterable[Tensor]:
        return (*self.rests, *(() if self.reference is None else (self.reference,)))

    def _skips(self, step: int, change: Tensor) -> bool:
        """Whether the other blocks rest. Waits for the device only where that is open."""
        if self.reference is None or step < self.cache.warmup_steps:
            return False
        if self.skipped >= self.cache.max_consecutive:
            return False
        return bool((relative_change(change, self.reference) < self.cache.threshold).all())

    def _predicted(self, step: int) -> Tensor:
        weights = WEIGHTS[self.cache.predictor](self.known, self.sigmas[step])
        return combine(self.rests, weights)

    def _keep(self, step: int, first: Tensor, rest: Tensor) -> None:
        self.reference = first
        self.rests.appendleft(rest)
        self.known.appendleft(self.sigmas[step])
        self.skipped = 0


def relative_change(now: Tensor, then: Tensor) -> Tensor:
    """mean|now − then| / mean|then| of each item: two B×S×D -> B, float32.

    Not below any threshold (infinite or NaN) where `then` is zero or a value is not finite.
    """
    difference = (now - then).abs().mean(dim=(1, 2), dtype=torch.float32)
    return difference / then.abs().mean(dim=(1, 2), dtype=torch.float32)


def _after(blocks: Iterable[tuple[str, Any]]) -> Any:
    """Run these blocks; the state after the last one. States in between are not kept."""
    ((_, state),) = deque(blocks, maxlen=1)
    return state
