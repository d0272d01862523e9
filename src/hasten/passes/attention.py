"""The `[attention]` pass: selects the attention kernel, with "auto" by a short trial per shape.

PyTorch selects a kernel by a fixed order, not by speed: on Hopper it uses flash attention 2 where
cuDNN's kernel is twice as fast.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hasten.recipe import Attention
from hasten.step.applied import Applied, Replaced, replace_attribute
from hasten.step.call import Inner, Output, StepCall
from hasten.step.chain import StepChain
from hasten.step.protocols import Transformer

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
TRIALS = 10  # timed calls of a backend per round, after three untimed ones
ROUNDS = 5
CYCLES = 4_000_000  # GPU cycles to wait before a round: 2 ms, in which all calls are launched


class Attend:
    """Attention of B×L×heads×head_dim queries, keys and values, in a selected backend.

    "native" leaves the selection to PyTorch. "auto" times the backends at the first call of each
    shape and dtype and keeps the fastest.

    Args:
        backend: A backend of `[attention]`.
        layers: The transformer's attention layers, whose processors are set to the same backend.
        heads: Number of attention heads and head_dim, for trials on behalf of `layers`.

    Attributes:
        chosen: The backends that "auto" has selected, by shape and dtype.
    """

    def __init__(self, backend: str, layers: Sequence[Any] = (), heads: Shape = ()) -> None:
        self.backend = backend
        self.layers = layers
        self.heads = heads
        self.chosen: dict[Case, str] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output, B×L×heads×head_dim."""
        return _attention(self.backend_for(tuple(q.shape), q.dtype, q.device), q, k, v)

    def backend_for(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
        """The backend for a shape (B, L, heads, head_dim); "auto" runs a trial for a new shape."""
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

    def prepare(self, batch: int, length: int, latents: Tensor) -> None:
        """Set the layers to the backend for a call with `length` tokens per image."""
        shape = batch, length, *self.heads
        self.set_layers(self.backend_for(shape, latents.dtype, latents.device))

    def live(self) -> str:
        """The selected backends and their shapes."""
        return ", ".join(
            f"{backend} for {shape[0]}×{shape[1]} tokens"
            for (shape, _), backend in self.chosen.items()
        )

    def set_layers(self, backend: str) -> None:
        """Set the backend of the transformer's own layers."""
        for layer in self.layers:
            layer.processor._attention_backend = DIFFUSERS_NAMES[backend]


class AttentionLayer:
    """Sets the transformer's attention layers to the backend of each call's shape.

    Args:
        attend: Selects the backend.
        tokens: Names of the forward's arguments whose tokens attend to each other.
    """

    name = "attention"

    def __init__(self, attend: Attend, tokens: tuple[str, ...]) -> None:
        self.attend = attend
        self.tokens = tokens

    def __call__(self, call: StepCall, inner: Inner) -> Output:
        streams = [call.inputs[name] for name in self.tokens if name in call.inputs]
        length = sum(stream.shape[1] for stream in streams)
        self.attend.prepare(len(call.latents), length, call.latents)
        return inner(call)

    def live(self) -> str:
        return self.attend.live()


def choose_attention(
    chain: StepChain, recipe: Attention, tokens: tuple[str, ...]
) -> tuple[Applied, Attend]:
    """Select the attention backend of the original blocks and of the fused ones.

    A named backend is set once; "auto" adds a layer to the chain. Processors are replaced by
    copies, since pipelines that share weights share them.

    Args:
        chain: The transformer's chain.
        recipe: The recipe's section.
        tokens: Names of the forward's arguments whose tokens attend to each other.

    Returns:
        The applied pass, and the attention function for the fused blocks.
    """
    config, layers = chain.transformer.config, attention_layers(chain.transformer)
    heads = (config.get("num_attention_heads"), config.get("attention_head_dim"))
    attend = Attend(recipe.backend, layers, heads)
    replaced = [
        replace_attribute(layer, "processor", copy.copy(layer.processor)) for layer in layers
    ]
    description: str = recipe.backend
    if recipe.backend == "auto":
        chain.push(AttentionLayer(attend, tokens))
        description = "the fastest backend per shape, by trial"
    else:
        attend.set_layers(recipe.backend)
    return (
        Applied(
            name="attention",
            description=description,
            undo=partial(_undo, chain, replaced),
            live=attend.live,
        ),
        attend,
    )


def attention_layers(transformer: Transformer) -> list[Any]:
    """The transformer's modules whose processors have a selectable backend."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention as LegacyAttention

    kinds = AttentionModuleMixin, LegacyAttention
    return [
        child
        for child in transformer.modules()
        if isinstance(child, kinds) and hasattr(child.processor, "_attention_backend")
    ]


def _undo(chain: StepChain, replaced: Sequence[Replaced]) -> None:
    chain.remove(AttentionLayer.name)
    for put_back in replaced:
        put_back()


def _random(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Three random tensors from a separate generator: the user's random state is unchanged."""
    own = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, dtype=dtype, device=device, generator=own) for _ in range(3)]


def _attention(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "native":
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(BACKENDS[backend]):
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _seconds(backend: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Seconds per call on the GPU, the minimum of several rounds; infinite if unsupported.

    The GPU waits until all calls of a round are launched, so launch overhead is not measured.
    """
    try:
        for _ in range(3):
            _attention(backend, q, k, v)
    except RuntimeError:
        return float("inf")
    clock: Any = torch.cuda
    rounds: list[float] = []
    with torch.cuda.device(q.device):
        for _ in range(ROUNDS):
            begun, ended = (clock.Event(enable_timing=True) for _ in range(2))
            clock._sleep(CYCLES)
            begun.record()
            for _ in range(TRIALS):
                _attention(backend, q, k, v)
            ended.record()
            torch.cuda.synchronize(q.device)
            rounds.append(begun.elapsed_time(ended))
    return min(rounds) / TRIALS / 1000
