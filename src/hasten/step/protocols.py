"""The members of Diffusers' objects that hasten relies on, and the private names among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["PRIVATE_NAMES", "Config", "Pipeline", "Scheduler", "Transformer"]

PRIVATE_NAMES: Mapping[str, tuple[str, ...]] = {
    "diffusers.DiffusionPipeline": ("_execution_device",),
    "diffusers.FluxPipeline": ("_unpack_latents",),
    "diffusers.models.cache_utils.CacheMixin": ("_reset_stateful_cache",),
    "diffusers.models.transformers.transformer_flux.FluxAttnProcessor": ("_attention_backend",),
    "diffusers.loaders.PeftAdapterMixin": ("_hf_peft_config_loaded",),
    "diffusers.FluxTransformer2DModel": ("_repeated_blocks", "_no_split_modules"),
    "torch.nn.Module": ("_call_impl", "_compiled_call_impl"),
}
"""Private names of other libraries that hasten reads or replaces, by where they are defined. A
test holds each of them to exist in the installed versions."""


class Config(Protocol):
    """A model's or a scheduler's configuration: a mapping whose keys are attributes, too."""

    def get(self, key: str, default: object = None, /) -> Any: ...
    def items(self) -> Any: ...
    def __getattr__(self, name: str) -> Any: ...


class Scheduler(Protocol):
    """A scheduler of flow matching. `step_index` is None before the run's first step."""

    timesteps: Tensor
    sigmas: Tensor
    step_index: int | None
    begin_index: int | None


class Transformer(Protocol):
    """A diffusion transformer: an `nn.Module` with a config."""

    @property
    def config(self) -> Config: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def forward(self) -> Callable[..., Any]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...
    def get_submodule(self, name: str, /) -> nn.Module: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def buffers(self) -> Iterator[Tensor]: ...


class Pipeline(Protocol):
    """A Diffusers pipeline."""

    scheduler: Scheduler
    transformer: Transformer

    @property
    def components(self) -> dict[str, Any]: ...
    @property
    def config(self) -> Config: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
