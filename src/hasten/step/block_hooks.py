"""Hooks around the transformer's blocks that can skip them.

A hook is installed where `nn.Module.compile` installs compiled code: outside the block's forward,
its own hooks, and the wrappers of offloading or compilation. The transformer's own forward always
runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

Streams = dict[str, Tensor]


class Visitor(Protocol):
    """Inspects the token streams between blocks during one call of the transformer."""

    def before(self, index: int, streams: Streams) -> bool:
        """Called before a block.

        Args:
            index: The position of the block.
            streams: The inputs of the block by name, B×tokens×D each.

        Returns:
            Whether to skip the block; the streams then go to the next one unchanged.
        """

    def after_last(self, streams: Streams, *, skipped: bool) -> Streams:
        """Called after the last block; returns the input streams of the output layers."""


class BlockHooks:
    """One hook per block of a transformer; inactive outside `visited_by`.

    Args:
        blocks: Each block with the names of the arguments that it returns, in the order in which
            it returns them.
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
        """Call the visitor around every block that runs inside the context."""
        self.attach()
        self.visitor = visitor
        try:
            yield
        finally:
            self.visitor = None

    def attach(self) -> None:
        """Install the hooks that are missing; a deep copy of a module does not copy them."""
        for hook in self.hooks:
            if hook.block._compiled_call_impl is not hook:
                hook.call = hook.block._compiled_call_impl or hook.block._call_impl
                hook.compiled = hook.block._compiled_call_impl
                hook.block._compiled_call_impl = hook

    def remove(self) -> None:
        """Restore the compiled code that was there before."""
        for hook in self.hooks:
            block: Any = hook.block
            if block._compiled_call_impl is hook:
                block._compiled_call_impl = hook.compiled


class BlockHook:
    """Called in place of one block, with the same arguments and results."""

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
