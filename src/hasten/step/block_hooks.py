"""Hooks around the transformer's blocks that can pass them by.

A hook is put in the place where `nn.Module.compile` puts compiled code: outside of the block's
forward, its own hooks, and what offloading or compilation wraps around it. The transformer's own
forward runs, whatever is done to its blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

Streams = dict[str, Tensor]


class Visitor(Protocol):
    """What looks at the streams of tokens between blocks during one call of the transformer."""

    def before(self, index: int, streams: Streams) -> bool:
        """Before a block, with the streams that it will get.

        Returns:
            Whether to pass the block by; the streams then go to the next one as they are.
        """

    def after_last(self, streams: Streams, *, skipped: bool) -> Streams:
        """After the last block; returns the streams that the output layers get."""


class BlockHooks:
    """One hook for each of a transformer's blocks; idle outside of `visited_by`.

    Args:
        blocks: Each block with the names of those of its arguments that it returns, in the order
            in which it returns them.
    """

    def __init__(self, blocks: list[tuple[nn.Module, tuple[str, ...]]]) -> None:
        self.visitor: Visitor | None = None
        last = len(blocks) - 1
        self.hooks = [
            BlockHook(self, index, block, returns, last=index == last)
            for index, (block, returns) in enumerate(blocks)
        ]

    @contextmanager
    def visited_by(self, visitor: Visitor) -> Iterator[None]:
        """The visitor sees every block that runs in the block of this statement."""
        self.attach()
        self.visitor = visitor
        try:
            yield
        finally:
            self.visitor = None

    def attach(self) -> None:
        """Put each hook in its place, unless it is there: a deep copy of a module leaves it out."""
        for hook in self.hooks:
            if hook.block._compiled_call_impl is not hook:
                hook.call = hook.block._compiled_call_impl or hook.block._call_impl
                hook.compiled = hook.block._compiled_call_impl
                hook.block._compiled_call_impl = hook

    def remove(self) -> None:
        """Put back what was there."""
        for hook in self.hooks:
            block: Any = hook.block
            if block._compiled_call_impl is hook:
                block._compiled_call_impl = hook.compiled


class BlockHook:
    """Called in the place of one block, with its arguments and its results."""

    def __init__(
        self,
        owner: BlockHooks,
        index: int,
        block: nn.Module,
        returns: tuple[str, ...],
        *,
        last: bool,
    ) -> None:
        self.owner, self.index, self.block = owner, index, block
        self.returns, self.last = returns, last
        self.names = list(inspect.signature(type(block).forward).parameters)[1:]
        self.compiled: Callable[..., Any] | None = None
        self.call: Callable[..., Any] = block._call_impl

    def __call__(self, *args: object, **kwargs: object) -> Any:
        visitor = self.owner.visitor
        if visitor is None:
            return self.call(*args, **kwargs)
        streams = self._streams({**dict(zip(self.names, args, strict=False)), **kwargs})
        skipped = visitor.before(self.index, streams)
        if not skipped:
            output = self.call(*args, **kwargs)
            if not self.last:
                return output
            values = output if isinstance(output, tuple) else (output,)
            streams = dict(zip(self.returns, values, strict=True))
        if self.last:
            streams = visitor.after_last(streams, skipped=skipped)
        values = tuple(streams[name] for name in self.returns)
        return values if len(values) > 1 else values[0]

    def _streams(self, arguments: Mapping[str, Any]) -> Streams:
        return {name: arguments[name] for name in self.returns}
