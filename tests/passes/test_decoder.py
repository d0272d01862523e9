"""The decoder's layout, compilation and tiling: close or equal pictures, bounded, undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import FluxImg2ImgPipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters

import hasten
from hasten.check import check, problems
from hasten.errors import UnsupportedError
from hasten.families.flux1 import FLUX1
from hasten.machine import machine
from hasten.passes import decoder as decoder_pass
from hasten.passes.decoder import AUTO_PIXELS, MOST_COMPILATIONS, compile_decoder, tile
from hasten.recipe import Recipe
from tests.test_check import Capable, NoCompiler

Call = Callable[..., torch.Tensor]


def needs_compiler(test: Any) -> Any:
    """Marks for what torch.compile takes its time over."""
    trouble = machine().compile_problem("cpu") is not None
    return pytest.mark.slow(
        pytest.mark.skipif(trouble, reason="torch.compile cannot work here")(test)
    )


def decoder(**section: Any) -> Recipe:
    return Recipe.from_dict({"decoder": section})


class BoomError(Exception):
    pass


@pytest.fixture
def picture(call: Call) -> Callable[..., torch.Tensor]:
    """Call a pipeline for a picture, N×3×H×W in [0, 1]."""
    return lambda pipe, **kwargs: call(pipe, **{"output_type": "pt", **kwargs})


@torch.no_grad()
def decoded(vae: Any, *shape: int) -> torch.Tensor:
    """Random latents of B × h × w, decoded."""
    batch, height, width = shape
    latents = torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(0))
    image: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return image


def kernels(vae: nn.Module) -> list[torch.Tensor]:
    return [kernel for kernel in vae.parameters() if kernel.ndim == 4]


# Layout


def test_channels_last_gives_the_same_picture_and_is_undone(pipe: Any, picture: Call) -> None:
    expected = picture(pipe)
    before = [(kernel, kernel.stride()) for kernel in pipe.vae.parameters()]
    fast = hasten.optimize(pipe, decoder(channels_last=True))
    assert all(
        kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels(pipe.vae)
    )
    got = picture(fast)
    assert got.is_contiguous(memory_format=torch.channels_last), "activations follow the kernels"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert "decoder: 42 convolution kernels laid out channels last" in fast.summary()
    fast.restore()
    assert [kernel.stride() for kernel in pipe.vae.parameters()] == [stride for _, stride in before]
    assert torch.equal(picture(pipe), expected)


def test_a_copy_leaves_the_original_layout(pipe: Any, picture: Call) -> None:
    expected = picture(pipe)
    strides = [kernel.stride() for kernel in pipe.vae.parameters()]
    fast = hasten.optimize(pipe, decoder(channels_last=True, tiling="auto"), copy=True)
    picture(fast)
    assert [kernel.stride() for kernel in pipe.vae.parameters()] == strides
    assert "decode" not in vars(pipe.vae)
    assert torch.equal(picture(pipe), expected)
    fast.restore()


def test_image_to_image_still_encodes(pipe: Any, picture: Call) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    arguments = {"image": image, "strength": 0.6}
    expected = picture(FluxImg2ImgPipeline.from_pipe(pipe), **arguments)
    fast = hasten.optimize(pipe, decoder(channels_last=True, tiling="auto"))
    for twin in (fast.from_pipe(FluxImg2ImgPipeline), FluxImg2ImgPipeline.from_pipe(pipe)):
        torch.testing.assert_close(picture(twin, **arguments), expected, rtol=1e-4, atol=1e-5)


def test_true_guidance_and_latents_are_the_plain_ones(pipe: Any, call: Call) -> None:
    arguments = {"true_cfg_scale": 2.0, "negative_prompt": "blurry"}
    expected = call(pipe, **arguments)
    fast = hasten.optimize(pipe, decoder(channels_last=True, tiling="on"))
    assert torch.equal(call(fast, **arguments), expected)


# Tiling


@pytest.mark.parametrize(
    ("height", "width", "tiled"),
    [(256, 256, False), (256, 257, True), (128, 512, False), (129, 512, True), (64, 64, False)],
)
def test_auto_tiles_by_the_size_of_the_picture(
    height: int, width: int, tiled: bool, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = pipe.vae
    seen = []

    def decode(z: torch.Tensor) -> DecoderOutput:
        seen.append(vae.use_tiling)
        return DecoderOutput(sample=z)

    monkeypatch.setattr(vae, "_decode", decode)
    assert (height * 8) * (width * 8) > AUTO_PIXELS or not tiled
    applied = tile(vae, "auto")
    for batch in (1, 2):
        vae.decode(torch.zeros(batch, 1, height, width))
    assert seen == [tiled, tiled]
    assert vae.use_tiling is False
    assert applied.live() == ("2 so far" if tiled else "")


def test_auto_is_bit_equal_below_and_tiled_above(
    make_pipe: Callable[[], Any], picture: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_pass, "AUTO_PIXELS", 48 * 48)
    plain, always, auto = make_pipe(), make_pipe(), make_pipe()
    always.vae.enable_tiling()
    fast = hasten.optimize(auto, decoder(tiling="auto"))
    large = {"height": 64, "width": 64}
    for size in ({"height": 48, "width": 48}, large, {"height": 32, "width": 64}, large):
        reference = always if size is large else plain
        assert torch.equal(picture(fast, **size), picture(reference, **size)), size
    assert not torch.equal(picture(plain, **large), picture(always, **large))
    assert "over 2048x2048 pixels decoded in tiles (2 so far)" in fast.summary()
    assert "unchanged: encoding" in fast.summary()
    fast.restore()
    assert torch.equal(picture(auto, **large), picture(plain, **large))
    assert "decode" not in vars(auto.vae)


def test_an_error_while_decoding_leaves_tiling_as_it_was(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_pass, "AUTO_PIXELS", 0)
    tile(pipe.vae, "auto")

    def explode(*_: Any, **__: Any) -> None:
        raise BoomError

    with monkeypatch.context() as broken:
        broken.setattr(pipe.vae, "tiled_decode", explode)
        with pytest.raises(BoomError):
            decoded(pipe.vae, 1, 6, 6)
    assert pipe.vae.use_tiling is False
    assert decoded(pipe.vae, 1, 6, 6).shape == (1, 3, 48, 48)


def test_on_tiles_what_is_larger_than_a_tile(make_pipe: Callable[[], Any], picture: Call) -> None:
    reference, pipe = make_pipe(), make_pipe()
    small, large = {"height": 32, "width": 32}, {"height": 48, "width": 64}
    untiled = picture(reference, **small), picture(reference, **large)
    reference.vae.enable_tiling()
    fast = hasten.optimize(pipe, decoder(tiling="on"))
    assert torch.equal(picture(fast, **small), untiled[0])
    assert torch.equal(picture(fast, **large), picture(reference, **large))
    assert "decoder: images over 32 pixels per side in tiles" in fast.summary()
    fast.restore()
    assert torch.equal(picture(pipe, **large), untiled[1])


@pytest.mark.parametrize("tiling", ["on", "auto"])
def test_tiling_the_user_had_switched_on_stays(tiling: str, pipe: Any, picture: Call) -> None:
    pipe.vae.enable_tiling()
    expected = picture(pipe, height=48, width=48)
    fast = hasten.optimize(pipe, decoder(tiling=tiling))
    assert torch.equal(picture(fast, height=48, width=48), expected)
    fast.restore()
    assert pipe.vae.use_tiling is True
    assert torch.equal(picture(pipe, height=48, width=48), expected)


def test_somebody_elses_decode_is_not_undone(pipe: Any) -> None:
    fast = hasten.optimize(pipe, decoder(tiling="auto"))
    ours = pipe.vae.decode
    pipe.vae.decode = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
    fast.restore()
    assert pipe.vae.decode is theirs


def test_an_empty_section_changes_nothing(pipe: Any, picture: Call) -> None:
    expected = picture(pipe)
    fast = hasten.optimize(pipe, decoder())
    assert "nothing changed" in fast.summary()
    assert torch.equal(picture(fast), expected)


def test_offloading_goes_on_top(pipe: Any, picture: Call) -> None:
    """Hooks put on afterwards move the VAE, decode tiles it, and either can go first."""
    fast = hasten.optimize(pipe, decoder(channels_last=True, tiling="auto"))
    expected = picture(fast)
    pipe.enable_model_cpu_offload(device="cpu")
    moved = []
    before = pipe.vae._hf_hook.pre_forward
    pipe.vae._hf_hook.pre_forward = lambda *args, **kwargs: (
        moved.append(1) or before(*args, **kwargs)
    )
    assert torch.equal(picture(fast), expected)
    assert moved
    fast.restore()
    assert picture(pipe).shape == expected.shape
    pipe.remove_all_hooks()


# Compilation


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@needs_compiler
def test_one_compilation_serves_all_sizes(pipe: Any, picture: Call, fresh_dynamo: None) -> None:
    """The first picture is square: without care its symmetry would become a rule."""
    sizes = [(32, 32), (48, 32), (32, 48), (16, 48)]  # all below one threshold of the CPU's
    expected = [picture(pipe, height=height, width=width) for height, width in sizes]
    fast = hasten.optimize(pipe, decoder(compile=True, channels_last=True))
    for (height, width), plain in zip(sizes, expected, strict=True):
        got = picture(fast, height=height, width=width)
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert f"Decoder compiled (1 of {MOST_COMPILATIONS} compilations done)" in fast.summary()
    for kernel in pipe.vae.parameters():  # as offloading moves weights: other storage
        kernel.data = kernel.data.clone()
    picture(fast)
    assert counters["stats"]["unique_graphs"] == 1
    fast.restore()
    assert torch.equal(picture(pipe), expected[0])


@needs_compiler
@pytest.mark.usefixtures("no_code")
def test_compilations_are_bounded(
    pipe: Any, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_pass, "MOST_COMPILATIONS", 1)
    shapes = [(1, 4, 4), (2, 4, 4), (1, 12, 24), (3, 1, 4), (1, 4, 6)]
    expected = [decoded(pipe.vae, *shape) for shape in shapes]
    applied = compile_decoder(pipe.vae)
    for shape, plain in zip(shapes, expected, strict=True):
        torch.testing.assert_close(decoded(pipe.vae, *shape), plain, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert applied.live().startswith("1 of 1 compilations done; sizes without compiled code")
    double = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    assert double(torch.ones(3)).sum() == 6
    assert counters["stats"]["unique_graphs"] == 2, "others compile as before"


@needs_compiler
def test_tiles_share_one_compilation(
    pipe: Any, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_pass, "AUTO_PIXELS", 0)
    tile(pipe.vae, "auto")
    expected = decoded(pipe.vae, 1, 6, 7)
    applied = compile_decoder(pipe.vae)
    torch.testing.assert_close(decoded(pipe.vae, 1, 6, 7), expected, rtol=1e-4, atol=1e-4)
    assert applied.live().startswith("2 of"), "whole tiles, and those one latent wide"
    assert applied.undo is not None
    applied.undo()
    assert torch.equal(decoded(pipe.vae, 1, 6, 7), expected)


# What cannot be done


def test_a_compiler_is_needed(pipe: Any) -> None:
    found = problems(decoder(compile=True), NoCompiler(), "cpu")  # type: ignore[arg-type]
    assert [fault for fault, _ in found] == ["no C++ compiler"]
    assert found[0].fix.endswith("or leave decoder.compile out")
    assert problems(decoder(channels_last=True), NoCompiler(), "cpu") == []  # type: ignore[arg-type]
    assert problems(decoder(compile=True), Capable(), "cuda") == []  # type: ignore[arg-type]


def test_a_compiled_decoder_is_not_compiled_again(pipe: Any) -> None:
    pipe.vae.decoder.compile()
    with pytest.raises(UnsupportedError, match="decoder is already compiled"):
        check(decoder(compile=True), pipe, FLUX1, Capable())  # type: ignore[arg-type]
    check(decoder(channels_last=True), pipe, FLUX1, Capable())  # type: ignore[arg-type]


def test_a_pipeline_without_a_vae_is_refused(pipe: Any) -> None:
    pipe.vae = None
    with pytest.raises(UnsupportedError, match="has no vae") as caught:
        hasten.optimize(pipe, decoder(channels_last=True))
    assert "[decoder]" in caught.value.fix


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_and_offloaded_on_a_gpu(make_pipe: Callable[[], Any], picture: Call) -> None:
    """Weights come and go between the calls; code, layout and pictures stay."""
    expected = picture(make_pipe().to("cuda"))
    recipe = {
        "decoder": {"compile": True, "channels_last": True, "tiling": "auto"},
        "text": {"cache_mb": 16},
        "offload": {"kind": "model"},
    }
    fast = hasten.optimize(make_pipe().to("cuda"), Recipe.from_dict(recipe))
    graphs = []
    for _ in range(3):
        torch.testing.assert_close(picture(fast), expected, rtol=1e-3, atol=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2], "moving the weights compiled again"
    assert "4 hits, 2 misses" in fast.summary()
    fast.restore()
    torch.testing.assert_close(picture(fast.pipe), expected, rtol=1e-3, atol=1e-3)
