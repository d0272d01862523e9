"""Damaged model folders are loaded and drawn with, or refused with lines that can be printed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

import hasten
from hasten.generation import Request, render
from hasten.models import load_pipeline
from hasten.recipe import Recipe
from hasten.settings import Settings
from tests.fuzz.damage import SEED, damaged, refused_well

pytestmark = pytest.mark.fuzz

PIECES = [
    b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"9" * 400, b"-1", b"0", b"1e999", b"NaN", b"null",
    b'"\\u001b[2J"', b'"\\u0000"', b'"\\ud800"', b'"' + b"x" * 50_000 + b'"', b"\xef\xbb\xbf",
    b"\x00", b"\xff", b"true", b"{}", b"[]", b'["os", "system"]', b'"../../etc/passwd"', b"1.5",
    b'["diffusers", "Missing"]', b'["transformers", "T5EncoderModel"]', b"64", b"[[1]]",
]  # fmt: skip
ODD = [None, -1, 0, 3, 1.5, 1e308, float("nan"), "x", "\x1b[2J", [], {}, True, 10**30, [1, 2]]
CONFIGS = [
    "model_index.json",
    "hasten.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "scheduler/scheduler_config.json",
]
FILES = [
    *CONFIGS,
    "tokenizer_2/tokenizer_config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder_2/model.safetensors",
]


def draw(model: Path) -> None:
    fast = hasten.optimize(load_pipeline(str(model), device="cpu"), Recipe())
    settings = Settings(32, 32, 2, 3.5, 8)
    render(fast, Request("a red kite", str(model), Recipe(), 0, settings))


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.mark.parametrize("file", FILES)
def test_damaged_files(file: str, model: Path) -> None:
    refused = 0
    for content in damaged((model / file).read_bytes(), PIECES, 10):
        (model / file).write_bytes(content)
        refused += refused_well(draw, model)
    assert refused
    (model / file).unlink()
    refused_well(draw, model)


@pytest.mark.parametrize("file", CONFIGS)
def test_odd_values(file: str, model: Path) -> None:
    rng = random.Random(SEED)
    content = json.loads((model / file).read_text())
    for _ in range(10):
        odd = content | {rng.choice(list(content)): rng.choice(ODD)}
        (model / file).write_text(json.dumps(odd))
        refused_well(draw, model)
