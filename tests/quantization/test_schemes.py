"""The table of schemes is what recipes offer and what the classes do."""

from __future__ import annotations

from typing import get_args

import torch

from hasten.kernels.quantize import LIMITS
from hasten.quantization.linear import dtype_of, linear_class, quantized
from hasten.quantization.schemes import SCHEMES
from hasten.recipe import Quantize, Text


def test_recipes_offer_these_schemes() -> None:
    assert get_args(Quantize.model_fields["scheme"].annotation) == tuple(SCHEMES)
    weights = [name for name, scheme in SCHEMES.items() if not scheme.activations]
    of_text = get_args(Text.model_fields["scheme"].annotation)[0]
    assert list(get_args(of_text)) == weights


def test_the_classes_do_what_the_table_says() -> None:
    for name, scheme in SCHEMES.items():
        new = quantized(torch.nn.Linear(32, 16), Quantize(scheme=name))
        assert type(new) is linear_class(Quantize(scheme=name))
        assert type(new).__name__ == scheme.linear
        assert new.weight.dtype == dtype_of(scheme)
        assert scheme.limit == LIMITS[dtype_of(scheme)]
        assert float(new.weight.float().abs().max()) == scheme.limit
