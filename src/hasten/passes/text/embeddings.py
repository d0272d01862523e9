"""A cache of prompt embeddings in front of the text encoders.

It caches the calls of the encoders, not of a pipeline's `encode_prompt`: pipelines made with
`from_pipe` share the encoders, and the tokens of a prompt may change (the tokenizer, textual
inversion, `max_sequence_length`). The tokens and the encoder's state determine the embeddings. A
negative prompt is a further entry; `num_images_per_prompt` is applied to the cached embeddings.

The cache is installed where `nn.Module.compile` installs compiled code, outside the forward and the
wrappers of offloading. So an encoder is not moved to the device for cached embeddings.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

from torch import Tensor, nn

from hasten.passes.text.key import key_of
from hasten.step.applied import Applied
from hasten.step.protocols import Pipeline

_off: ContextVar[bool] = ContextVar("no prompt embedding is taken from a cache", default=False)


@contextmanager
def cache_off() -> Iterator[None]:
    """Encode every prompt again inside the context and cache nothing. For timing."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


class CachedEncoder:
    """Called in place of one text encoder, with the same arguments and results.

    Embeddings are kept in host memory. A caller gets a copy on the device of the original result.
    """

    def __init__(self, encoder: nn.Module, name: str, store: EmbeddingStore) -> None:
        self.encoder = encoder
        self.name = name
        self.store = store
        self.uncached = 0
        self.encode: Callable[..., Any] = encoder._compiled_call_impl or encoder._call_impl

    def __call__(self, *args: object, **kwargs: object) -> Any:
        key = None if _off.get() else key_of(self.encoder, args, kwargs)
        if key is None:
            self.uncached += 1
            return self.encode(*args, **kwargs)
        kept = self.store.get((self.name, key))
        if kept is not None:
            return _mapped(kept, lambda held: held.copy())
        embeddings = self.encode(*args, **kwargs)
        try:
            kept = _mapped(embeddings, _Held)
        except TypeError:
            self.uncached += 1
        else:
            self.store.put((self.name, key), kept, _size(kept) + _size(key))
        return embeddings


class EmbeddingCaches:
    """One cache per text encoder of a pipeline, with one common store.

    Args:
        encoders: The text encoders by their names in the pipeline.
        limit: The maximum size of all embeddings together, in bytes.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], limit: int) -> None:
        self.store = EmbeddingStore(limit)
        self.caches = [
            CachedEncoder(encoder, name, self.store) for name, encoder in encoders.items()
        ]
        self.before = [cache.encoder._compiled_call_impl for cache in self.caches]
        self.attach()

    def attach(self) -> None:
        """Install the caches."""
        for cache in self.caches:
            cache.encoder._compiled_call_impl = cache

    def remove(self) -> None:
        """Restore the encoders, unless they have been compiled or wrapped since."""
        for cache, previous in zip(self.caches, self.before, strict=True):
            encoder: Any = cache.encoder
            if encoder._compiled_call_impl is cache:
                encoder._compiled_call_impl = previous

    def live(self) -> str:
        store, uncached = self.store, sum(cache.uncached for cache in self.caches)
        return (
            f"{len(store)} kept, {store.size / 2**20:.2f} MiB, {store.hits} hits, "
            f"{store.misses} misses" + (f", {uncached} not cacheable" if uncached else "")
        )


def cache_embeddings(pipe: Pipeline, cache_mb: int) -> Applied:
    """Put one cache of at most `cache_mb` MiB in front of the pipeline's text encoders."""
    encoders = text_encoders(pipe)
    caches = EmbeddingCaches(
        {name: encoder for name, encoder in encoders.items() if encoder is not None},
        cache_mb * 2**20,
    )
    return Applied(
        name="text",
        description=f"at most {cache_mb} MiB of prompt embeddings kept in host memory",
        undo=caches.remove,
        renew=caches.attach,
        unchanged=tuple(
            (name, "not loaded") for name, encoder in encoders.items() if encoder is None
        ),
        live=caches.live,
    )


def text_encoders(pipe: Pipeline) -> dict[str, nn.Module | None]:
    """A pipeline's text encoders by name, in order; None for encoders that are not loaded."""
    return {
        name: component
        for name, component in pipe.components.items()
        if name.startswith("text_encoder")
    }


class _Held:
    """A copy of a tensor in host memory, and the tensor's device."""

    def __init__(self, tensor: object) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError
        self.tensor = tensor.detach().to("cpu", copy=True)
        self.device = tensor.device

    def copy(self) -> Tensor:
        return self.tensor.to(self.device, copy=True)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same tuple, list or Transformers output with `change` applied to its leaves."""
    if isinstance(value, Mapping):
        return type(value)(**{name: _mapped(item, change) for name, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, change) for item in value)
    return None if value is None else change(value)


def _size(value: Any) -> int:
    """Bytes of all tensors and byte strings in a nested value."""
    if isinstance(value, _Held):
        return value.tensor.nbytes
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, bytes) else 0


class EmbeddingStore:
    """A bounded, thread-safe dictionary that drops the least recently used values.

    Attributes:
        limit: The maximum size of all values together, in bytes.
        size: The current size of all values together, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.hits = 0
        self.misses = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Any:
        """Return the value and mark it as most recently used; None if there is none."""
        with self._lock:
            if key not in self._values:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: object, size: int) -> None:
        """Store a value of `size` bytes, unless it is larger than the limit."""
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
        """A deep copy is empty."""
        return EmbeddingStore(self.limit)
