"""The `[decoder]` pass: memory layout, compilation and tiling of the VAE's decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hasten.recipe import Decoder
from hasten.step.applied import Applied, replace_attribute
from hasten.step.protocols import Component

AUTO_PIXELS = 2048 * 2048
"""`tiling = "auto"` tiles images with more pixels than this."""

# One image and a batch of several need separate code, and torch may select other convolutions for
# very small or very large sizes. Exceeding Dynamo's own limit of 8 would be an error.
MOST_COMPILATIONS = 4


def improve_decoder(vae: Component | None, recipe: Decoder) -> Iterator[Applied]:
    """Apply a recipe's `[decoder]`; yield each part as it is applied."""
    if vae is None:  # `check` rejects [decoder] without a VAE
        return
    if recipe.channels_last:
        yield lay_out_channels_last(vae)
    if recipe.compile:
        yield compile_decoder(vae)
    if recipe.tiling != "off":
        yield tile(vae, recipe.tiling)


def lay_out_channels_last(vae: Component) -> Applied:
    """Store all convolution kernels in channels-last format; activations follow their format.

    The modules get new parameters, so a pipeline that shares the old ones is not affected.
    """
    changed = [
        (module, name)
        for module in vae.modules()
        for name, kernel in module._parameters.items()
        if kernel is not None
        and kernel.ndim == 4
        and not kernel.is_contiguous(memory_format=torch.channels_last)
    ]
    _lay_out(changed, torch.channels_last)
    return Applied(
        name="decoder",
        description=f"{len(changed)} convolution kernels laid out channels last",
        undo=partial(_lay_out, changed, torch.contiguous_format),
    )


def _lay_out(changed: Sequence[tuple[nn.Module, str]], layout: torch.memory_format) -> None:
    for module, name in changed:
        old = module._parameters.get(name)
        if old is not None:
            module._parameters[name] = _parameter_in(old, layout)


def _parameter_in(old: nn.Parameter, layout: torch.memory_format) -> nn.Parameter:
    values = old.detach().contiguous(memory_format=layout)
    return nn.Parameter(values, requires_grad=old.requires_grad)


class BoundedCompilation:
    """A decoder's forward, compiled for any height and width, a bounded number of times.

    After `MOST_COMPILATIONS` compilations, sizes without compiled code run uncompiled, which is
    slower but equally correct.
    """

    def __init__(self, decoder: nn.Module) -> None:
        from torch._dynamo.utils import counters

        self.counters = counters
        self.decoder = decoder
        self.renew()

    def renew(self) -> None:
        """Compile the current decoder again; that of a deep copy is a new one."""
        self.forward: Callable[..., Tensor] = torch.compile(
            self.decoder._call_impl, fullgraph=True, dynamic=True
        )
        self.compilations = 0
        self.decoder._compiled_call_impl = self

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedCompilation:
        return BoundedCompilation(copy.deepcopy(self.decoder, memo))

    def __call__(self, sample: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Decode B × C × h × w latents.

        A tile of larger latents is made contiguous first; its strides would trigger a compilation.
        """
        sample = sample.contiguous()
        if self.compilations >= MOST_COMPILATIONS:
            with torch.compiler.set_stance("eager_on_recompile"):
                return self.forward(sample, *args, **kwargs)
        height, width = sample.shape[-2:]
        if not self.compilations and height == width > 2:
            # Dynamo would assume h = w and compile again for the first non-square image.
            self._compile(sample[..., :-1].contiguous(), *args, **kwargs)
        return self._compile(sample, *args, **kwargs)

    def _compile(self, *args: object, **kwargs: object) -> Tensor:
        """Run, compile if necessary, and count the compilations."""
        before = self.counters["stats"]["unique_graphs"]
        output = self.forward(*args, **kwargs)
        self.compilations += max(0, self.counters["stats"]["unique_graphs"] - before)
        return output

    def live(self) -> str:
        """The compilations so far, for the summary."""
        spent = f"{self.compilations} of {MOST_COMPILATIONS} compilations done"
        full = self.compilations >= MOST_COMPILATIONS
        return f"{spent}; sizes without compiled code run uncompiled" if full else spent


def compile_decoder(vae: Component) -> Applied:
    """Compile the decoder in place, at its first call; the encoder is not compiled."""
    decoder = vae.decoder
    compiled = BoundedCompilation(decoder)
    return Applied(
        name="decoder",
        description=f"{type(decoder).__name__} compiled",
        undo=partial(setattr, decoder, "_compiled_call_impl", None),
        renew=compiled.renew,
        unchanged=(("encoder", "text-to-image pipelines do not run it"),),
        live=compiled.live,
    )


def tile(vae: Component, mode: Literal["auto", "on"]) -> Applied:
    """Decode large images in overlapping tiles, which needs less memory but leaves faint seams.

    Args:
        vae: The VAE.
        mode: "on" tiles every image larger than one tile, in decoding and encoding. "auto" tiles
            only decoding, and only images of more than `AUTO_PIXELS`.
    """
    return _tile_large_ones(vae) if mode == "auto" else _tile_always(vae)


def _tile_always(vae: Component) -> Applied:
    before = vae.use_tiling
    vae.enable_tiling()
    side = getattr(vae, "tile_sample_min_size", None)
    large = f"over {side} pixels per side" if side else "larger than one tile"
    return Applied(
        name="decoder",
        description=f"images {large} in tiles",
        undo=partial(setattr, vae, "use_tiling", before),
    )


class TiledDecode:
    """Replaces a VAE's `decode`: images of more than `AUTO_PIXELS` are decoded in tiles."""

    def __init__(self, vae: Component, pixels_per_latent: int) -> None:
        self.vae, self.pixels_per_latent = vae, pixels_per_latent
        self.decode: Callable[..., Any] = vae.decode
        self.tiled = 0

    def __call__(self, z: Tensor, *args: object, **kwargs: object) -> Any:
        """Decode B × C × … × h × w latents; other arguments and the result are as in `decode`."""
        pixels = z.shape[-2] * z.shape[-1] * self.pixels_per_latent
        if self.vae.use_tiling or pixels <= AUTO_PIXELS:
            return self.decode(z, *args, **kwargs)
        self.tiled += 1
        self.vae.use_tiling = True
        try:
            return self.decode(z, *args, **kwargs)
        finally:
            self.vae.use_tiling = False

    def live(self) -> str:
        return f"{self.tiled} so far" if self.tiled else ""


def _tile_large_ones(vae: Component) -> Applied:
    tiled = TiledDecode(vae, pixels_per_latent(vae))
    return Applied(
        name="decoder",
        description="images over 2048x2048 pixels decoded in tiles",
        undo=replace_attribute(vae, "decode", tiled),
        unchanged=(("encoding", "image-to-image inputs are encoded without tiles"),),
        live=tiled.live,
    )


def pixels_per_latent(vae: Component) -> int:
    """Pixels per latent position; 64 for a VAE that does not declare its compression ratio."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    if ratio is None and "block_out_channels" in vae.config:
        ratio = 2 ** (len(vae.config.block_out_channels) - 1)
    return int(ratio or 8) ** 2
