"""Shapes and the size budget, counted without allocating the weights."""

from __future__ import annotations

import torch
from training.flow import position_ids
from training.latents import packed
from training.models import (
    FULL,
    autoencoder,
    clip_text,
    parameter_count,
    scheduler,
    t5_encoder,
    transformer,
)
from training.package import BUDGET_MIB
from training.text import train_bpe, train_unigram

TEXT_FILES_MIB = 0.25  # tokenizers, configs, card


def test_the_package_fits_its_budget() -> None:
    pieces, bpe = train_unigram(), train_bpe()
    with torch.device("meta"):
        modules = (
            transformer(FULL, guidance=True),
            autoencoder(FULL, shipped=True),
            t5_encoder(FULL, len(pieces)),
            clip_text(FULL, bpe["vocab"]),
        )
    assert 2 * parameter_count(*modules) / 2**20 + TEXT_FILES_MIB < BUDGET_MIB


def test_widths_fit_each_other() -> None:
    assert sum(FULL.rope) == FULL.head_width
    assert all(width % FULL.groups == 0 for width in FULL.channels)
    assert len(FULL.channels) == 4  # eight times down


def test_the_new_transformer_outputs_zero_and_learns_from_its_last_layer_first() -> None:
    from training.models import SMOKE

    model = transformer(SMOKE, guidance=True)
    text_ids, image_ids = position_ids(torch.device("cpu"))
    output = model(
        hidden_states=torch.randn(2, 64, 64),
        timestep=torch.rand(2),
        guidance=torch.tensor([1.0, 3.5]),
        encoder_hidden_states=torch.randn(2, 32, SMOKE.t5_width),
        pooled_projections=torch.randn(2, SMOKE.clip_width),
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    assert output.shape == (2, 64, 64)
    assert output.abs().max() == 0
    output.sub(1).square().mean().backward()
    assert model.proj_out.bias.grad.abs().max() > 0


def test_packing_is_the_pipelines() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 16, 16)
    expected = FluxPipeline._pack_latents(latents, 2, 16, 16, 16)
    assert torch.equal(packed(latents), expected)
    ids = FluxPipeline._prepare_latent_image_ids(2, 8, 8, torch.device("cpu"), torch.float32)
    assert torch.equal(position_ids(torch.device("cpu"))[1], ids)


def test_the_sampler_is_static() -> None:
    assert not scheduler().config.use_dynamic_shifting
