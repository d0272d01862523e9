"""Weights by their values: the same in every dtype, another where one value differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.engines.tensorrt.digests import pipeline_digest, weights_digest
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
