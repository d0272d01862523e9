"""The modules of the bundled pipeline, plain Diffusers and Transformers classes, from scratch.

`FULL` is the model that ships; `SMOKE` has the same architecture and is small enough for CPU tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from training.text import BOS, EOS, TEXT_TOKENS

__all__ = [
    "FULL",
    "SHIFT",
    "SIZE",
    "SMOKE",
    "Sizes",
    "autoencoder",
    "clip_text",
    "parameter_count",
    "scheduler",
    "t5_encoder",
    "transformer",
]

SIZE = 128  # pixels a side
SHIFT = 1.5  # static timestep shift of the sampler


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of the four modules."""

    heads: int = 4
    head_width: int = 48
    rope: tuple[int, int, int] = (8, 20, 20)
    double_blocks: int = 4
    single_blocks: int = 7
    channels: tuple[int, ...] = (32, 64, 96, 128)
    shipped_channels: tuple[int, ...] = (32, 64, 96, 96)
    groups: int = 16
    t5_width: int = 192
    t5_layers: int = 2
    clip_width: int = 128
    clip_layers: int = 2


FULL = Sizes()
SMOKE = Sizes(
    heads=2,
    head_width=16,
    rope=(4, 6, 6),
    double_blocks=1,
    single_blocks=1,
    channels=(8, 8, 8, 16),
    shipped_channels=(8, 8, 8, 8),
    groups=4,
    t5_width=32,
    t5_layers=1,
    clip_width=32,
    clip_layers=1,
)


def transformer(sizes: Sizes, *, guidance: bool) -> FluxTransformer2DModel:
    """FLUX's transformer, AdaLN and the output zero-initialised, all other linears Xavier."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sizes.head_width,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.t5_width,
        pooled_projection_dim=sizes.clip_width,
        guidance_embeds=guidance,
        axes_dims_rope=sizes.rope,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            silent = ".norm" in name or name.startswith("norm_out") or name == "proj_out"
            if silent:
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def autoencoder(sizes: Sizes, *, shipped: bool) -> AutoencoderKL:
    """Sixteen latent channels, eight times down, no attention, no quantisation convolutions.

    The one that ships is narrower than the one whose latents the transformer learns.
    """
    channels = sizes.shipped_channels if shipped else sizes.channels
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=sizes.groups,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def t5_encoder(sizes: Sizes, vocabulary: int) -> T5EncoderModel:
    """T5 v1.1 encoder (gated GELU); the pipeline gives it `TEXT_TOKENS` tokens and no mask."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=sizes.t5_width,
            d_kv=sizes.t5_width // 4,
            d_ff=2 * sizes.t5_width,
            num_layers=sizes.t5_layers,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=TEXT_TOKENS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            use_cache=False,
        )
    )


def clip_text(sizes: Sizes, vocabulary: dict[str, int]) -> CLIPTextModel:
    """CLIP's text transformer; its pooled output is the state at the first end-of-text token."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=sizes.clip_width,
            intermediate_size=4 * sizes.clip_width,
            projection_dim=sizes.clip_width,
            num_hidden_layers=sizes.clip_layers,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=vocabulary[BOS],
            eos_token_id=vocabulary[EOS],
            pad_token_id=vocabulary[EOS],
        )
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's sampler with a fixed shift, since the model has only one image size."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=SHIFT,
        use_dynamic_shifting=False,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def parameter_count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
