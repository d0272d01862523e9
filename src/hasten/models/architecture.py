"""Published architectures that can be built without their weights. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hasten.errors import InputError


@dataclass(frozen=True)
class Shape:
    """Constructor arguments of each component of a pipeline; others keep the class's defaults."""

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    t5: dict[str, Any]
    clip: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=dict)


# Source of the figures: the config.json files of black-forest-labs/FLUX.1-dev.
FLUX_1_DEV = Shape(
    name="flux.1-dev",
    transformer={
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    vae={
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    t5={
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    clip={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    scheduler={
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
)

SHAPES = {FLUX_1_DEV.name: FLUX_1_DEV}


def shape_named(name: str) -> Shape:
    """The shape of that name.

    Raises:
        InputError: The name is unknown; the known ones are listed.
    """
    if name not in SHAPES:
        names = ", ".join(f"shape:{shape}" for shape in SHAPES)
        raise InputError(f"unknown shape {name!r}", f"use one of {names}")
    return SHAPES[name]
