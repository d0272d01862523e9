"""A small FLUX.1 and its graphs, exported once for all tests of a worker. Do not change them."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.engines.tensorrt.manifest import Shapes
from hasten.engines.tensorrt.nodes import Amax
from hasten.families.flux1 import FLUX1
from hasten.models.random_weights import variance_preserving_

FAMILY = FLUX1
SHAPES = Shapes(text=8, least=4, best=16, most=64)


def small_transformer() -> Any:
    """One block of each kind, 48 wide; √24 is no bfloat16 number. The same every time."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=24,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 10, 10),
        )
        variance_preserving_(model).eval().requires_grad_(False)
        for name, tensor in model.named_parameters():
            if ".norm_" in name:  # of queries and keys: no two the same
                tensor.uniform_(0.5, 1.5)
        return model


def amax_of(transformer: Any) -> dict[str, Amax]:
    """Plausible largest inputs, different ones for each linear, and the true ones of weights."""
    return {
        name: Amax(4 + 0.37 * index, float(linear.weight.abs().max()))
        for index, (name, linear) in enumerate(FAMILY.quantizable(transformer))
    }


def values_of(amax: Mapping[str, Amax]) -> dict[str, Any]:
    """A calibration as plain values, to compare."""
    return {
        name: (one.input, one.weight, None if one.smooth is None else one.smooth.tolist())
        for name, one in amax.items()
    }


def global_state() -> dict[str, Any]:
    """What a library call must leave as it was."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    return {
        "rng": torch.get_rng_state().tolist(),
        "filters": list(warnings.filters),
        "levels": {logger.name: logger.level for logger in loggers if logger.level},
        "handlers": list(logging.getLogger().handlers),
        "stdout": sys.stdout,
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "threads": torch.get_num_threads(),
        "functions": [
            {name: value for name, value in vars(module).items() if callable(value)}
            for module in (torch, torch.nn.functional)
        ],
    }


@contextmanager
def unchanged_globals() -> Iterator[None]:
    before = global_state()
    yield
    after = global_state()
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name == "levels":  # imports may make loggers of their own
            assert value.items() <= after[name].items()
        else:
            assert value == after[name], name


@pytest.fixture
def transformer() -> Any:
    """A new one for each test."""
    return small_transformer()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Call it with "bf16", "fp16" or "fp8" for the folder of that graph of `small_transformer`."""
    pytest.importorskip("onnxscript")
    from hasten.engines.tensorrt.export import export_onnx

    @cache
    def folder(precision: str) -> Path:
        model, path = small_transformer(), tmp_path_factory.mktemp(precision)
        amax = amax_of(model) if precision == "fp8" else None
        export_onnx(model, FAMILY, precision, amax, SHAPES, path)
        return path

    return folder
