"""Which kernel computes attention, chosen per shape by a short trial.

PyTorch's own choice is by a fixed order, not by speed: on Hopper it takes flash attention 2 where
cuDNN's kernel runs twice as fast.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hasten.passes.applied import Applied, replace_attribute
from hasten.recipe import Attention

__all__ = ["Attend", "choose_attention"]

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DIFFUSERS_NAMES = {
    "native": "native",
    "cudnn": "_native_cudnn",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "math": "_native_math",
}
ON_TRIAL = ("cudnn", "flash", "efficient")
Shape = tuple[int, ...]
Case = tuple[Shape, torch.dtype]
TRIALS = 10  # calls a backend is timed by, after three that are not


class Attend:
    """Attention of B×L×heads×head_dim queries, keys and values, in a chosen backend.

    "native" leaves the choice to PyTorch; "auto" times the backends at the first call of each shape
    and dtype and keeps the fastest. `chosen` says which; `layers` are the transformer's own
    attention layers, whose processors follow.
    """

    def __init__(self, backend: str, layers: Sequence[Any] = (), heads: Shape = ()) -> None:
        self.backend = backend
        self.layers = layers
        self.heads = heads
        self.chosen: dict[Case, str] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """B×L×heads×head_dim."""
        return _attention(self.backend_for(tuple(q.shape), q.dtype, q.device), q, k, v)

    def backend_for(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
        """The backend for B, L, heads, head_dim; where it is "auto", after a trial if need be."""
        if self.backend != "auto":
            return self.backend
        if device.type != "cuda":
            return "native"
        case = shape, dtype
        if case not in self.chosen:
            q, k, v = _random(shape, dtype, device)
            times = {name: _seconds(name, q, k, v) for name in ON_TRIAL}
            best = min(times, key=lambda name: times[name])
            self.chosen[case] = best if times[best] < float("inf") else "native"
        return self.chosen[case]

    def prepare(self, latents: Tensor, text: Tensor) -> None:
        """Set the layers to the backend for a call with these latents (B×S×C) and text (B×T×…)."""
        shape = len(latents), latents.shape[1] + text.shape[1], *self.heads
        self.set_layers(self.backend_for(shape, latents.dtype, latents.device))

    def set_layers(self, backend: str) -> None:
        """Have the transformer's own layers run on this backend."""
        for layer in self.layers:
            layer.processor._attention_backend = DIFFUSERS_NAMES[backend]


def choose_attention(transformer: Any, recipe: Attention) -> tuple[Applied, Attend]:
    """Attention for the fused blocks, and the same backend for the original ones.

    A named backend is set once; "auto" goes before the transformer's forward. Processors are
    replaced by copies, since pipelines that share weights share them.
    """
    config, layers = transformer.config, _attentions(transformer)
    attend = Attend(recipe.backend, layers, (config.num_attention_heads, config.attention_head_dim))
    replaced = [(layer, layer.processor, copy.copy(layer.processor)) for layer in layers]
    for layer, _, own in replaced:
        layer.processor = own
    put_back = _nothing
    if recipe.backend == "auto":
        put_back = _before_each_call(transformer, attend)
    else:
        attend.set_layers(recipe.backend)

    def undo() -> None:
        put_back()
        for layer, processor, own in replaced:
            if layer.processor is own:  # else somebody has put in another since
                layer.processor = processor

    def live() -> str:
        return ", ".join(
            f"{backend} for {shape[0]}×{shape[1]} tokens"
            for (shape, _), backend in attend.chosen.items()
        )

    what = "the fastest backend a shape, by trial" if recipe.backend == "auto" else recipe.backend
    return Applied(name="attention", what=what, undo=undo, live=live), attend


def _before_each_call(transformer: Any, attend: Attend) -> Callable[[], None]:
    """Have the layers' backend chosen before each forward; returns what undoes it."""
    forward = transformer.forward

    def on_backend(*args: Any, **kwargs: Any) -> Any:
        latents = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        attend.prepare(latents, text)
        return forward(*args, **kwargs)

    return replace_attribute(transformer, "forward", on_backend)


def _random(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Three tensors; the user's random numbers stay as they would be."""
    own = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, dtype=dtype, device=device, generator=own) for _ in range(3)]


def _nothing() -> None:
    return None


def _attentions(transformer: Any) -> list[Any]:
    from diffusers.models.attention import AttentionModuleMixin

    return [child for child in transformer.modules() if isinstance(child, AttentionModuleMixin)]


def _attention(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "native":
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(BACKENDS[backend]):
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _seconds(backend: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of one call; infinite where the backend cannot do it."""
    try:
        for _ in range(3):
            _attention(backend, q, k, v)
    except RuntimeError:
        return float("inf")
    torch.cuda.synchronize(q.device)
    begun = time.perf_counter()
    for _ in range(TRIALS):
        _attention(backend, q, k, v)
    torch.cuda.synchronize(q.device)
    return (time.perf_counter() - begun) / TRIALS
