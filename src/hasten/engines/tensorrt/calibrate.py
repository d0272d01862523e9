"""Calibrates the FP8 scales of a model's linears with NVIDIA's Model Optimizer.

It observes the pipeline while it generates images and records the largest absolute value of each
tensor ("max"). Optionally, it first moves outliers of the inputs into the weights ("smoothquant",
Xiao et al., arXiv:2211.10438, with α = 0.5).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.check import refuse_optimized
from hasten.engines.tensorrt.export import refuse_adapters
from hasten.engines.tensorrt.nodes import Amax
from hasten.engines.tensorrt.packages import needed
from hasten.engines.tensorrt.preflight import METHODS
from hasten.errors import EngineError, InputError, ModelError
from hasten.families.family import Family
from hasten.log import logger, quiet
from hasten.structural_copy import structural_copy

ALPHA = 0.5  # of SmoothQuant: the share of the outliers that is moved into the weights


@torch.no_grad()
def calibrate_fp8(
    pipe: Any,
    family: Family,
    prompts: Sequence[str],
    *,
    method: str = METHODS[0],
    seed: int = 0,
    **arguments: Any,
) -> dict[str, Amax]:
    """Measure the largest input and weight of each quantisable linear over all steps and prompts.

    The result is deterministic for a seed. A structural copy runs, so the pipeline is not changed.
    Each prompt is logged at DEBUG when it begins.

    Args:
        pipe: A text-to-image pipeline.
        family: Its family.
        prompts: Text prompts; a few are enough.
        method: "max" or "smoothquant".
        seed: The seed of the first prompt's noise; each later prompt adds 1.
        **arguments: Arguments of the pipeline's calls. Use the number of steps of later runs,
            because the scales depend on the noise levels.

    Returns:
        The measured values by the linears' names.

    Raises:
        InputError: There are no prompts, or a linear never ran.
        EngineError: The transformer has adapters, or the method is unknown.
        ModelError: A value is not finite.
        UnsupportedError: Model Optimizer is missing, or the model is offloaded or compiled.
        AlreadyOptimizedError: The pipeline is optimised.
    """
    if not prompts:
        raise InputError("there are no prompts to calibrate on", "pass a few prompts")
    if method not in METHODS:
        raise EngineError(f"unknown calibration {method!r}", f"use one of {', '.join(METHODS)}")
    refuse_optimized(pipe)
    refuse_adapters(pipe.transformer)
    plain = structural_copy(pipe)
    plain.set_progress_bar_config(disable=True)
    names = [name for name, _ in family.quantizable(plain.transformer)]
    if method == "smoothquant":
        _own_weights(plain.transformer, names)

    def generate(model: nn.Module) -> None:
        plain.transformer = model
        for index, prompt in enumerate(prompts):
            logger.debug(f"calibrating: prompt {index + 1} of {len(prompts)}")
            noise = torch.Generator().manual_seed(seed + index)
            plain(prompt=prompt, output_type="latent", generator=noise, **arguments)

    watched = _watch(plain.transformer, names, method, generate)
    return {name: _observed(name, watched.get_submodule(name), method) for name in names}


def save_amax(amax: Mapping[str, Amax], path: Path) -> None:
    """Write a calibration as safetensors: NAME.input and NAME.weight, 0-dim, and NAME.smooth."""
    from safetensors.torch import save_file

    tensors = {}
    for name, largest in amax.items():
        tensors[f"{name}.input"] = torch.tensor(largest.input, dtype=torch.float64)
        tensors[f"{name}.weight"] = torch.tensor(largest.weight, dtype=torch.float64)
        if largest.smooth is not None:
            tensors[f"{name}.smooth"] = largest.smooth.contiguous()
    save_file(tensors, path)


def load_amax(path: Path) -> dict[str, Amax]:
    """Read a file of `save_amax`; the linears are in alphabetical order.

    Raises:
        InputError: The file is not a calibration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    entries: dict[str, dict[str, Any]] = {}
    try:
        for key, tensor in sorted(load_file(path).items()):
            name, _, field = key.rpartition(".")
            entries.setdefault(name, {})[field] = tensor if field == "smooth" else float(tensor)
        return {name: Amax(**values) for name, values in entries.items()}
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a calibration: {error}", "calibrate again") from error


def _watch(
    transformer: nn.Module, names: Sequence[str], method: str, generate: Callable[[nn.Module], None]
) -> nn.Module:
    """Add Model Optimizer's quantisers to the transformer and run `generate` to calibrate them.

    All quantisers are disabled before those of the named linears are enabled. The format is 8-bit
    integers because SmoothQuant skips all others; the largest values do not depend on it.
    """
    tensorwise = {"num_bits": 8, "axis": None}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            *(
                {"quantizer_name": f"{name}.{side}_quantizer", "cfg": tensorwise, "enable": True}
                for name in names
                for side in ("weight", "input")
            ),
        ],
        "algorithm": "max" if method == "max" else {"method": "smoothquant", "alpha": ALPHA},
    }
    outside = sys.stdout

    def loop(model: nn.Module) -> None:
        with redirect_stdout(outside):
            generate(model)

    try:
        # It warns about newer versions and prints the quantisers that it inserted.
        with functions_restored(), quiet():
            optimizer = needed("modelopt.torch.quantization")
            watched: nn.Module = optimizer.quantize(transformer, config, loop)
    except AssertionError as error:  # raised for values that are not finite
        raise ModelError(
            f"Model Optimizer cannot calibrate this model: {error}",
            "load the model in bfloat16 or float32",
        ) from error
    return watched


def _own_weights(transformer: nn.Module, names: Sequence[str]) -> None:
    """Copy the linears' weights, because SmoothQuant writes to them in place."""
    for name in names:
        linear: Any = transformer.get_submodule(name)
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)


def _observed(name: str, linear: Any, method: str) -> Amax:
    """The largest values that a linear's quantisers have observed."""
    seen: Tensor | None = linear.input_quantizer.amax
    if seen is None:
        raise InputError(f"the linear {name} never ran", "calibrate with calls that use it")
    amax = Amax(
        input=float(seen),
        weight=float(linear.weight_quantizer.amax),
        smooth=linear.input_quantizer.pre_quant_scale.detach().float().cpu().clone()
        if method == "smoothquant"
        else None,
    )
    if not (math.isfinite(amax.input) and math.isfinite(amax.weight)):
        raise ModelError(
            f"inputs or weights of {name} are not all finite",
            "load the model in bfloat16 or float32",
        )
    return amax


@contextmanager
def functions_restored() -> Iterator[None]:
    """Restore torch's functions after Model Optimizer has run a model.

    It replaces functions of torch while a module runs and does not restore them if the module
    raises. All later calls of the process would then go through a quantiser.
    """
    before = [(module, dict(vars(module))) for module in (torch, functional)]
    try:
        yield
    finally:
        for module, functions in before:
            for name, function in functions.items():
                if callable(function) and vars(module).get(name) is not function:
                    setattr(module, name, function)
                    if f"_{name}" not in functions:  # Model Optimizer's name for the original
                        vars(module).pop(f"_{name}", None)
