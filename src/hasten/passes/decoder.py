"""The VAE: memory layout, compilation and tiling of its decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hasten.passes.applied import Applied
from hasten.recipe import Decoder

__all__ = [
    "AUTO_PIXELS",
    "MOST_COMPILATIONS",
    "compile_decoder",
    "improve_decoder",
    "lay_out_channels_last",
    "tile",
]

AUTO_PIXELS = 2048 * 2048
"""`tiling = "auto"` tiles pictures of more pixels than this."""

# One image and a batch of several need code of their own; for very small or very large sizes torch
# may choose other convolutions. Dynamo's own limit is 8 and an error.
MOST_COMPILATIONS = 4


def improve_decoder(vae: Any, recipe: Decoder) -> Iterator[Applied]:
    """Apply a recipe's `[decoder]`, yielding each part as it is done."""
    if recipe.channels_last:
        yield lay_out_channels_last(vae)
    if recipe.compile:
        yield compile_decoder(vae)
    if recipe.tiling != "off":
        yield tile(vae, recipe.tiling)


def lay_out_channels_last(vae: nn.Module) -> Applied:
    """Store the kernels of all convolutions with the channels last; activations follow them.

    The modules get new parameters, so a pipeline that shares the old ones keeps its layout.
    """
    changed = [
        (module, name)
        for module in vae.modules()
        for name, kernel in module._parameters.items()
        if kernel is not None
        and kernel.ndim == 4
        and not kernel.is_contiguous(memory_format=torch.channels_last)
    ]
    for module, name in changed:
        _lay_out(module, name, torch.channels_last)

    def undo() -> None:
        for module, name in changed:
            if module._parameters.get(name) is not None:
                _lay_out(module, name, torch.contiguous_format)

    return Applied(
        name="decoder", what=f"{len(changed)} convolution kernels laid out channels last", undo=undo
    )


def _lay_out(module: nn.Module, name: str, layout: torch.memory_format) -> None:
    old = module._parameters[name]
    assert old is not None
    values = old.detach().contiguous(memory_format=layout)
    module._parameters[name] = nn.Parameter(values, requires_grad=old.requires_grad)


class BoundedCompilation:
    """A decoder's forward, compiled for any height and width, a bounded number of times.

    Once `MOST_COMPILATIONS` are spent, a size that no compiled code fits runs uncompiled, which is
    slower and as right.
    """

    def __init__(self, decoder: nn.Module) -> None:
        from torch._dynamo.utils import counters

        self.counters = counters
        self.forward: Callable[..., Tensor] = torch.compile(
            decoder._call_impl, fullgraph=True, dynamic=True
        )
        self.compilations = 0

    def __call__(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """sample: B × C × h × w latents; a tile of larger ones is packed first, for its strides
        would be taken for a size of its own."""
        sample = sample.contiguous()
        if self.compilations >= MOST_COMPILATIONS:
            with torch.compiler.set_stance("eager_on_recompile"):
                return self.forward(sample, *args, **kwargs)
        height, width = sample.shape[-2:]
        if not self.compilations and height == width > 2:
            # Dynamo would take h = w for a rule and compile again for the first oblong picture.
            self._compile(sample[..., :-1].contiguous(), *args, **kwargs)
        return self._compile(sample, *args, **kwargs)

    def _compile(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run, compiling where necessary, and count."""
        before = self.counters["stats"]["unique_graphs"]
        output = self.forward(*args, **kwargs)
        self.compilations += max(0, self.counters["stats"]["unique_graphs"] - before)
        return output

    def live(self) -> str:
        """For the summary."""
        spent = f"{self.compilations} of {MOST_COMPILATIONS} compilations done"
        full = self.compilations >= MOST_COMPILATIONS
        return f"{spent}; sizes that fit none of them run uncompiled" if full else spent


def compile_decoder(vae: Any) -> Applied:
    """Compile the decoder in place (lazily: at its first call); the encoder is left alone."""
    decoder = vae.decoder
    compiled = decoder._compiled_call_impl = BoundedCompilation(decoder)

    def undo() -> None:
        decoder._compiled_call_impl = None

    return Applied(
        name="decoder",
        what=f"{type(decoder).__name__} compiled",
        undo=undo,
        left_alone=(("encoder", "text-to-image pipelines do not run it"),),
        live=compiled.live,
    )


def tile(vae: Any, mode: Literal["auto", "on"]) -> Applied:
    """Decode large pictures in overlapping tiles: memory for one of them, and faint seams.

    "on": any picture larger than one tile, in decoding and encoding. "auto": only decoding, and
    only pictures of more than `AUTO_PIXELS`; what is smaller is decoded as if nothing were set.
    """
    return _tile_large_ones(vae) if mode == "auto" else _tile_always(vae)


def _tile_always(vae: Any) -> Applied:
    before = vae.use_tiling
    vae.enable_tiling()

    def undo() -> None:
        vae.use_tiling = before

    return Applied(
        name="decoder",
        what=f"pictures over {vae.tile_sample_min_size} pixels a side in tiles",
        undo=undo,
    )


def _tile_large_ones(vae: Any) -> Applied:
    before = vae.__dict__.get("decode")
    decode = vae.decode
    pixels_a_latent = 4 ** (len(vae.config.block_out_channels) - 1)
    tiled = 0

    def decode_by_size(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """z: B × C × h × w latents; the other arguments and the result are those of `decode`."""
        nonlocal tiled
        if vae.use_tiling or z.shape[-2] * z.shape[-1] * pixels_a_latent <= AUTO_PIXELS:
            return decode(z, *args, **kwargs)
        tiled += 1
        vae.use_tiling = True
        try:
            return decode(z, *args, **kwargs)
        finally:
            vae.use_tiling = False

    vae.decode = decode_by_size

    def undo() -> None:
        if vae.__dict__.get("decode") is not decode_by_size:  # somebody has replaced it since
            return
        if before is None:
            del vae.decode
        else:
            vae.decode = before

    return Applied(
        name="decoder",
        what="pictures over 2048x2048 pixels decoded in tiles",
        undo=undo,
        left_alone=(("encoding", "image-to-image inputs are encoded whole"),),
        live=lambda: f"{tiled} so far" if tiled else "",
    )
