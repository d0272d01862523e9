"""Keys: weights by their values, the same in every dtype; requests by model and versions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hasten.engines.tensorrt import keys
from hasten.engines.tensorrt.keys import content_key, pipeline_digest, request_key, weights_digest
from hasten.errors import EngineError
from hasten.models import load_pipeline


def test_digests_are_the_same_in_every_dtype(pipe: Any) -> None:
    transformer = pipe.transformer.to(torch.bfloat16)
    digest = weights_digest(transformer)
    assert weights_digest(transformer.to(torch.float32)) == digest
    with torch.no_grad():
        next(transformer.parameters()).view(-1)[0] += 1
    assert weights_digest(transformer) != digest
    assert weights_digest(transformer, torch.float16) != weights_digest(transformer)
    with pytest.raises(EngineError, match="no values"):
        weights_digest(nn.Linear(2, 2, device="meta"))


def test_a_digest_tells_apart_names_shapes_and_order() -> None:
    flat = nn.ParameterDict({"a": torch.zeros(4), "b": torch.ones(4)})
    square = nn.ParameterDict({"a": torch.zeros(2, 2), "b": torch.ones(4)})
    swapped = nn.ParameterDict({"a": torch.ones(4), "b": torch.zeros(4)})
    renamed = nn.ParameterDict({"a": torch.zeros(4), "c": torch.ones(4)})
    assert len({weights_digest(one) for one in (flat, square, swapped, renamed)}) == 4
    assert weights_digest(flat) == weights_digest(
        nn.ParameterDict({"b": flat["b"], "a": flat["a"]})
    )


def test_a_pipeline_is_its_tokenizers_too() -> None:
    pipe = load_pipeline("tiny", device="cpu", dtype="float32")
    before = pipeline_digest(pipe, "weights")
    assert pipeline_digest(pipe, "weights") == before
    pipe.tokenizer_2("a prompt", padding="max_length", max_length=5, truncation=True)
    assert pipeline_digest(pipe, "weights") == before, "a call changes nothing"
    pipe.tokenizer_2.add_tokens(["zzzunheard"])
    assert pipeline_digest(pipe, "weights") != before


def test_keys() -> None:
    assert content_key({"a": 1, "b": (2, 3)}) == content_key({"b": [2, 3], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    assert len(content_key({})) == 32


def test_another_version_is_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    before = request_key("shape:flux.1-dev", {})
    monkeypatch.setattr(keys, "version_of", lambda name: f"{name} of another day")
    assert request_key("shape:flux.1-dev", {}) != before


def test_a_request_s_key(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    weights = tmp_path / "inner" / "weights"
    weights.write_text("1")
    key = request_key(tmp_path, {"out": Path("engine")})
    assert request_key(tmp_path, {"out": Path("engine")}) == key
    assert request_key(tmp_path, {"out": Path("other")}) != key
    assert request_key("shape:flux.1-dev", {"out": Path("engine")}) != key
    times = weights.stat()
    weights.write_text("2")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert request_key(tmp_path, {"out": Path("engine")}) != key, "same size and time"
