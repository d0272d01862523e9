"""The policy of kind `residual`: run the first blocks, and the others only if the residual changes.

Let H_0 be the image tokens before the first block, H_n those after the n-th block and H_L those
after the last. The first blocks' residual is r = H_n − H_0. If it is close to that of the last
computed step,

    mean|r − r_ref| / mean|r_ref| < threshold    (L1 means over tokens and channels, per image),

the other blocks are skipped, and their last residual, H_L − H_n, is added to the current H_n. The
embedders, the first blocks and the output layers run on every step.

Sources: TeaCache (arXiv:2411.19108) predicts from an early signal how much the output will change.
FBCache (ParaAttention, github.com/chengzeyi/ParaAttention) uses the first block's residual as that
signal. DBCache (cache-dit) uses n blocks, a warm-up and a limit of consecutively skipped steps, and
can extrapolate the residual of the other blocks. They compare means over a whole batch; here a
batch skips only if each of its images would.

The decision is made on the host, so each call that may skip waits for the device once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hasten.passes.cache.predict import WEIGHTS, combine
from hasten.recipe import ResidualCache
from hasten.step.block_hooks import BlockHooks
from hasten.step.call import Inner, Output, StepCall

NO_LIMIT = 1000  # no run has more steps


class ResidualPolicy:
    """Decides on each step from the residual of the first blocks. It has no planner.

    Args:
        cache: The recipe's section.
        hooks: The hooks around the transformer's blocks.
        streams: Names of the streams that form the output; the first one is compared.
    """

    stores = "residuals"
    planner = None

    def __init__(self, cache: ResidualCache, hooks: BlockHooks, streams: tuple[str, ...]) -> None:
        self.cache = cache
        self.hooks = hooks
        self.streams = streams

    def begin(self, sigmas: Sequence[float]) -> Callable[[], ResidualBranch]:
        return partial(ResidualBranch, self, sigmas)

    def describe(self) -> str:
        cache = self.cache
        first = "block" if cache.first_blocks == 1 else f"{cache.first_blocks} blocks"
        most = cache.max_consecutive
        limit = "" if most >= NO_LIMIT else f" or {most} consecutive steps were skipped"
        return (
            f"computes the first {cache.warmup_steps} steps, then the first {first} of each step; "
            f"the other blocks run if the residual of the first {first} has changed by "
            f"{cache.threshold:g} or more since they last ran (relative L1, any image of a batch)"
            f"{limit}; otherwise {cache.predictor} of their residual; each decision waits for the "
            "device"
        )

    def remove(self) -> None:
        self.hooks.remove()


class ResidualBranch:
    """The residuals of the last computed steps, B×S×D each.

    Attributes:
        reference: The first blocks' residual at the last computed step.
        rests: The other blocks' residuals per stream, newest first: of one step (`reuse`) or two.
        known: Noise levels of those steps.
        skipped: The number of consecutive skipped steps so far.
    """

    def __init__(self, policy: ResidualPolicy, sigmas: Sequence[float]) -> None:
        self.policy = policy
        self.cache = policy.cache
        self.sigmas = sigmas
        history = 1 if self.cache.predictor == "reuse" else 2
        self.reference: Tensor | None = None
        self.rests: deque[list[Tensor]] = deque(maxlen=history)
        self.known: deque[float] = deque(maxlen=history)
        self.skipped = 0

    def output_of(self, call: StepCall, inner: Inner) -> Output:
        visit = Visit(self, call.step)
        with self.policy.hooks.visited_by(visit):
            output = inner(call)
        if visit.skips:
            self.skipped += 1
            return replace(output, computed=False)
        self.reference = visit.change.detach()
        self.rests.appendleft([rest.detach() for rest in visit.rests])
        self.known.appendleft(self.sigmas[call.step])
        self.skipped = 0
        return output

    def kept(self) -> Iterable[Tensor]:
        rests = [tensor for tensors in self.rests for tensor in tensors]
        return rests if self.reference is None else [*rests, self.reference]

    def is_skipped(self, step: int, change: Tensor) -> bool:
        """Whether the other blocks are skipped. Waits for the device only to compare residuals."""
        if self.reference is None or step < self.cache.warmup_steps:
            return False
        if self.skipped >= self.cache.max_consecutive:
            return False
        return bool((relative_change(change, self.reference) < self.cache.threshold).all())

    def predicted(self, step: int) -> list[Tensor]:
        """The predicted residual of the other blocks for each stream."""
        weights = WEIGHTS[self.cache.predictor](self.known, self.sigmas[step])
        return [combine(column, weights) for column in zip(*self.rests, strict=True)]


class Visit:
    """One call of the transformer, observed between its blocks.

    A stream may be the end of a longer one (text before image): its own tokens are the last ones.

    Attributes:
        change: The first blocks' residual of the first stream, B×S×D.
        rests: The other blocks' residual of each stream; empty if they were skipped.
        skips: Whether the other blocks were skipped.
    """

    def __init__(self, branch: ResidualBranch, step: int) -> None:
        self.branch, self.step = branch, step
        self.names = branch.policy.streams
        self.start: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.change: Tensor
        self.rests: list[Tensor] = []
        self.skips = False

    def before(self, index: int, streams: dict[str, Tensor]) -> bool:
        if not self.start:
            self.start = {name: streams[name] for name in self.names}
        if index >= self.branch.cache.first_blocks and not self.first:
            self.first = {name: self._own(name, streams) for name in self.names}
            compared = self.names[0]
            self.change = self.first[compared] - self.start[compared]
            self.skips = self.branch.is_skipped(self.step, self.change)
        return self.skips

    def after_last(self, streams: dict[str, Tensor], *, skipped: bool) -> dict[str, Tensor]:
        if not skipped:
            self.rests = [self._own(name, streams) - self.first[name] for name in self.names]
            return streams
        ended = dict(streams)
        for name, rest in zip(self.names, self.branch.predicted(self.step), strict=True):
            full, own = streams[name], self.first[name] + rest
            others = full[:, : full.shape[1] - own.shape[1]]
            ended[name] = torch.cat([others, own], dim=1) if others.shape[1] else own
        return ended

    def _own(self, name: str, streams: dict[str, Tensor]) -> Tensor:
        return streams[name][:, -self.start[name].shape[1] :]


def relative_change(now: Tensor, then: Tensor) -> Tensor:
    """mean|now − then| / mean|then| per item: two B×S×D tensors -> B, float32.

    The result is infinite or NaN, and so not below any threshold, if `then` is zero or a value is
    not finite.
    """
    difference = (now - then).abs().mean(dim=(1, 2), dtype=torch.float32)
    return difference / then.abs().mean(dim=(1, 2), dtype=torch.float32)
