"""What is timed of an image, and that the same number is the same image."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from studies.peers.flags import changed, compiler_settings
from studies.peers.image import Stopwatch
from studies.peers.model import build_pipeline, call_arguments, tokens_of
from studies.peers.workload import Workload

from hasten.models import architecture
from tests.conftest import SMALL

CPU = torch.device("cpu")


class Vae:
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> torch.Tensor:
        time.sleep(0.05)
        return latents / 0


def pipeline(vae: Any) -> Any:
    def call(*, decode: bool = True) -> Any:
        time.sleep(0.1)
        latents = torch.arange(4096.0)
        return SimpleNamespace(images=vae.decode(latents, return_dict=False) if decode else latents)

    return call


def test_the_loop_ends_where_the_decoder_begins() -> None:
    vae = Vae()
    image = Stopwatch(vae, CPU).time(pipeline(vae), {})
    assert 0.1 <= image.loop_seconds <= image.seconds - 0.05
    assert image.peak_bytes > 0
    assert not image.finite
    assert image.probe == [float(4 * index) for index in range(1024)]


def test_a_call_that_decodes_nothing_is_no_image() -> None:
    vae = Vae()
    stopwatch = Stopwatch(vae, CPU)
    stopwatch.time(pipeline(vae), {})
    with pytest.raises(RuntimeError, match=r"never called vae\.decode"):
        stopwatch.time(pipeline(vae), {"decode": False})


def test_a_shape_is_built_without_its_text_encoders_and_renders_numbered_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(architecture.SHAPES, "small", SMALL)
    workload = Workload("shape:small", "cpu", "float32", (32,), 2, 1, 8)
    pipe = build_pipeline(workload)
    assert pipe.text_encoder is pipe.text_encoder_2 is pipe.tokenizer is None
    assert tokens_of(pipe, workload, 32) == 8 + (32 // (2 * pipe.vae_scale_factor)) ** 2
    stopwatch = Stopwatch(pipe.vae, CPU)
    first, again, other = (
        stopwatch.time(pipe, call_arguments(pipe, workload, 32, number)) for number in (0, 0, 1)
    )
    assert first.finite
    assert first.seconds > first.loop_seconds > 0
    assert first.probe == again.probe != other.probe


def test_settings_that_changed_are_told() -> None:
    before = compiler_settings()
    assert changed(before, before) == {}
    with torch._inductor.config.patch(coordinate_descent_tuning=True):
        after = compiler_settings()
    assert changed(before, after) == {"inductor.coordinate_descent_tuning": "True"}
