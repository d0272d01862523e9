"""Published architectures with random weights, for timing without the original weights.

Every tensor is sampled on the device from a distribution that keeps activations near unit variance
through each linear or convolution (weights N(0, 1/fan_in), He et al. 2015 without the ReLU gain).
Text encoders keep the initialisation of their library. No memory is left uninitialised, because its
contents affect the power draw and therefore clocks and timings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ModelError
from hasten.families.flux1 import FLUX1
from hasten.models.architecture import Shape

SEED = 0


def build_shape(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a FluxPipeline with random weights directly on the device.

    The transformer gets notes: that the weights are random, and the standard deviations of the
    activations after the first and the last block and of the output, from one trial pass.

    Raises:
        ModelError: An activation is not finite.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    with _constructing(device, dtype):
        transformer, vae, clip, t5 = _components(shape)
        spread = activation_std(transformer)
    for component in (transformer, vae, clip, t5):
        component.eval().requires_grad_(False)
    transformer._hasten_notes = (
        "random weights: speed is meaningful, pictures are not",
        "activations finite, std " + ", ".join(f"{at} {std:.2f}" for at, std in spread.items()),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shape.scheduler),
        vae=vae,
        text_encoder=clip,
        tokenizer=RandomTokenizer(shape.clip["vocab_size"], 77, end=shape.clip["eos_token_id"]),
        text_encoder_2=t5,
        tokenizer_2=RandomTokenizer(shape.t5["vocab_size"], 512, end=1),
        transformer=transformer,
    )


def shape_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of all weights of a shape in a dtype; no weights are created."""
    with torch.device("meta"):
        weights = [weight for part in _components(shape) for weight in part.parameters()]
    return int(sum(weight.numel() for weight in weights)) * dtype.itemsize


def _components(shape: Shape) -> tuple[Any, Any, Any, Any]:
    """Transformer, VAE, CLIP and T5."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    return (
        variance_preserving_(FluxTransformer2DModel(**shape.transformer)),
        variance_preserving_(AutoencoderKL(**shape.vae)),
        CLIPTextModel(CLIPTextConfig(**shape.clip)),
        T5EncoderModel(T5Config(**shape.t5)),
    )


def variance_preserving_(module: nn.Module) -> Any:
    """Sample every linear and convolution again so that it preserves unit variance."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            fan_in = child.weight[0].numel()
            nn.init.normal_(child.weight, std=fan_in**-0.5)
            if child.bias is not None:
                nn.init.normal_(child.bias, std=0.02)
    return module


@torch.no_grad()
def activation_std(transformer: Any, tokens: int = 64, text_tokens: int = 16) -> dict[str, float]:
    """Standard deviations after the first block, after the last block and of the output.

    They come from one pass over random inputs at half noise.

    Raises:
        ModelError: Activations are not finite; the first such block is named.
    """
    config, weight = transformer.config, transformer.x_embedder.weight
    kwargs: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    stds: list[float] = []

    def record(name: str, _block: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        stds.append(_finite_std(name, output[1]))

    with ExitStack() as hooks:
        for name, block in FLUX1.repeated_blocks(transformer):
            hooks.callback(block.register_forward_hook(partial(record, name)).remove)
        output = transformer(
            hidden_states=torch.randn(1, tokens, config.in_channels, **kwargs),
            encoder_hidden_states=torch.randn(1, text_tokens, config.joint_attention_dim, **kwargs),
            pooled_projections=torch.randn(1, config.pooled_projection_dim, **kwargs),
            timestep=torch.full((1,), 0.5, **kwargs),
            guidance=torch.full((1,), 3.5, **kwargs) if config.guidance_embeds else None,
            img_ids=torch.zeros(tokens, 3, **kwargs),
            txt_ids=torch.zeros(text_tokens, 3, **kwargs),
            return_dict=False,
        )[0]
    last = _finite_std("proj_out", output)
    return {"first block": stds[0], "last block": stds[-1], "output": last}


class RandomTokenizer:
    """Replaces a tokenizer without its vocabulary: deterministic random ids of realistic length.

    A prompt becomes `max_length` ids from a generator seeded by its text, followed by the end
    token; with "longest" padding, it becomes one id per word. The time of text encoders does not
    depend on the ids.
    """

    def __init__(self, vocab_size: int, model_max_length: int, *, end: int) -> None:
        self.vocab_size = vocab_size
        self.model_max_length = model_max_length
        self.end = end
        self.added_tokens_encoder: dict[str, int] = {}  # no textual inversion

    def __call__(
        self,
        text: str | list[str],
        *,
        padding: str = "max_length",
        max_length: int | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """Return `input_ids` of shape (prompts, length), int64; other arguments have no effect."""
        prompts = [text] if isinstance(text, str) else text
        limit = max_length or self.model_max_length
        words = max(len(self.tokenize(prompt)) for prompt in prompts) + 1
        length = limit if padding == "max_length" else min(limit, words)
        return SimpleNamespace(input_ids=torch.stack([self._ids(p, length) for p in prompts]))

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, for Diffusers' textual-inversion look-up."""
        return text.split()

    def batch_decode(self, ids: Tensor) -> list[str]:
        """A placeholder per row, since ids have no text; used in messages about truncation."""
        return [f"{row.numel()} random token ids" for row in ids]

    def _ids(self, prompt: str, length: int) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7])
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, self.vocab_size - 2, (length,), generator=generator)
        ids[-1] = self.end
        return ids


def _finite_std(where: str, values: Tensor) -> float:
    if not torch.isfinite(values).all():
        raise ModelError(
            f"random weights: activations after {where} are not finite",
            "use a dtype with more range: bfloat16 or float32",
        )
    return float(values.float().std())


@contextmanager
def _constructing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create modules inside the context on the device, in the dtype and from a fixed seed.

    The caller's generators and default dtype are unchanged.
    """
    before = torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(SEED)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
