"""Values by key up to a number of bytes; the least recently used ones go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Any

__all__ = ["EmbeddingStore"]


class EmbeddingStore:
    """A bounded dictionary. Safe to use from several threads.

    limit: bytes that all values may have together; size: bytes that they have.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.hits = 0
        self.misses = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Any:
        """The value, which is then the most recently used one; None where there is none."""
        with self._lock:
            if key not in self._values:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: object, size: int) -> None:
        """Keep a value of `size` bytes; one larger than the limit is not kept."""
        with self._lock:
            self._drop(key)
            if size > self.limit:
                return
            while self.size + size > self.limit:
                self._drop(next(iter(self._values)))
            self._values[key] = (value, size)
            self.size += size

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def _drop(self, key: Hashable) -> None:
        _, size = self._values.pop(key, (None, 0))
        self.size -= size

    def __deepcopy__(self, _: object) -> EmbeddingStore:
        """A copy of what holds a store begins with an empty one."""
        return EmbeddingStore(self.limit)
