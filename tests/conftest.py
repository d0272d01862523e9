"""Pipelines for the engine's tests: real Diffusers components, small, random, made in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.models.architecture import Shape
from hasten.models.random_weights import build_shape

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # Diffusers imports onnxruntime
os.environ.pop("COLUMNS", None)  # of the terminal: what is printed into a pipe would be wrapped

SMALL = Shape(
    name="small",
    transformer={
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    vae={
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    t5={
        "vocab_size": 64,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    },
    clip={
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": 62,
        "eos_token_id": 63,
    },
    scheduler={"shift": 3.0, "use_dynamic_shifting": True},
)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def make_pipe() -> Callable[[], Any]:
    """Call it for a new pipeline with the same random weights every time, on the CPU."""
    return lambda: build_shape(SMALL, torch.device("cpu"), torch.float32)


@pytest.fixture
def pipe(make_pipe: Callable[[], Any]) -> Any:
    """One small random FluxPipeline on the CPU in float32."""
    return make_pipe()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small pipeline as a model directory, for processes of their own: it has no notes that
    its weights are random, and defaults of 32×32 px, 6 steps and 8 tokens. Do not change it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("small_model")
    pipe = build_shape(SMALL, torch.device("cpu"), torch.float32)
    words = ["<pad>", "<unk>", "red", "kite", *(f"word{number}" for number in range(4, 63)), "</s>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    for name, length in (("tokenizer", 77), ("tokenizer_2", 512)):
        backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            unk_token="<unk>",
            eos_token="</s>",
            model_max_length=length,
        )
        pipe.register_modules(**{name: tokenizer})
    pipe.save_pretrained(directory)
    (directory / "hasten.json").write_text(
        '{"width": 32, "height": 32, "steps": 6, "max_sequence_length": 8}'
    )
    return directory


@pytest.fixture
def call() -> Callable[..., torch.Tensor]:
    """Call a pipeline with small defaults: 32×32 px, 6 steps, seed 0; the latents come back."""

    def run(pipe: Any, prompt: Any = "a red fox", **kwargs: Any) -> torch.Tensor:
        seed = kwargs.pop("seed", 0)
        arguments = {
            "num_inference_steps": 6,
            "height": 32,
            "width": 32,
            "max_sequence_length": 8,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(seed),
            **kwargs,
        }
        result = pipe(prompt, **arguments)
        return result[0] if isinstance(result, tuple) else result.images

    return run
