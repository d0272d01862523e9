"""The pipeline that every row starts from, and the arguments of its calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from studies.peers.workload import Workload

from hasten.models import load_pipeline
from hasten.models.architecture import shape_named
from hasten.models.random_weights import build_shape

__all__ = ["build_pipeline", "call_arguments", "tokens_of"]

ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
# Encoders of a `shape:` model as small as they can be: they are dropped as soon as they are made.
SMALL_T5 = {"d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 32}
SMALL_CLIP = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 32,
    "bos_token_id": 30,
    "eos_token_id": 31,
}


def build_pipeline(workload: Workload) -> Any:
    """The workload's pipeline on its device, without text encoders: embeddings are given to it."""
    if workload.model.startswith("shape:"):
        pipe = _small_texts(workload)
    else:
        pipe = load_pipeline(workload.model, device=workload.device, dtype=workload.dtype)
    pipe.register_modules(**dict.fromkeys(ENCODERS))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _small_texts(workload: Workload) -> Any:
    shape = shape_named(workload.model.removeprefix("shape:"))
    small = replace(shape, t5={**shape.t5, **SMALL_T5}, clip={**shape.clip, **SMALL_CLIP})
    dtype: torch.dtype = getattr(torch, workload.dtype)
    return build_shape(small, torch.device(workload.device), dtype)


def call_arguments(pipe: Any, workload: Workload, size: int, number: int) -> dict[str, Any]:
    """Arguments of image `number`: its own random text embeddings, and a generator for its noise.

    Everything is on the device already, so that none of it is timed.
    """
    config = pipe.transformer.config
    device = torch.device(workload.device)
    texts = torch.Generator(device).manual_seed(2 * number)
    here: dict[str, Any] = {"generator": texts, "device": device, "dtype": torch.float32}
    dtype: torch.dtype = getattr(torch, workload.dtype)
    return {
        "prompt_embeds": torch.randn(
            1, workload.tokens, config.joint_attention_dim, **here
        ).to(dtype),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, **here).to(dtype),
        "width": size,
        "height": size,
        "num_inference_steps": workload.steps,
        "guidance_scale": workload.guidance,
        "generator": torch.Generator(device).manual_seed(2 * number + 1),
        "output_type": "pt",
    }  # fmt: skip


def tokens_of(pipe: Any, workload: Workload, size: int) -> int:
    """How many tokens, text and image together, a block attends over at this size."""
    patch = 2 * pipe.vae_scale_factor
    return workload.tokens + (size // patch) ** 2
