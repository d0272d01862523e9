"""The largest inputs and weights of a model's linears, by NVIDIA's Model Optimizer.

It observes the whole pipeline as it generates images, and keeps the largest absolute value that
each tensor ever had ("max"), or first moves outliers of the inputs into the weights ("smoothquant",
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

ALPHA = 0.5  # of SmoothQuant: how much of the outliers the weights take


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
    """The largest input per linear that `family.quantizable` names, over all steps of all prompts.

    Deterministic for a seed. Runs a structural copy, so the pipeline stays as it was, whatever
    happens. Each prompt is logged at DEBUG as it begins.

    Args:
        pipe: A text-to-image pipeline.
        family: Its family.
        prompts: A few are enough.
        method: max or smoothquant.
        seed: Of the first prompt's noise.
        **arguments: Of the pipeline's calls. Calibrate at the number of steps that will be run: the
            noise levels matter.

    Raises:
        InputError: No prompts, or a linear that never ran.
        EngineError: Adapters, an unknown method, or what Model Optimizer refuses.
        ModelError: Values that are not finite.
        UnsupportedError: Model Optimizer is missing, or the model is offloaded or compiled.
        AlreadyOptimizedError: The pipeline is optimised.
    """
    if not prompts:
        raise InputError("there are no prompts to calibrate on", "a few are enough")
    if method not in METHODS:
        raise EngineError(f"no calibration is called {method!r}", f"one of {', '.join(METHODS)}")
    refuse_optimized(pipe)
    refuse_adapters(pipe.transformer)
    plain = structural_copy(pipe)
    plain.set_progress_bar_config(disable=True)
    names = [name for name, _ in family.quantizable(plain.transformer)]
    if method == "smoothquant":
        _own_weights(plain.transformer, names)

    def draw(model: nn.Module) -> None:
        plain.transformer = model
        for index, prompt in enumerate(prompts):
            logger.debug(f"calibrating: prompt {index + 1} of {len(prompts)}")
            noise = torch.Generator().manual_seed(seed + index)
            plain(prompt=prompt, output_type="latent", generator=noise, **arguments)

    watched = _watch(plain.transformer, names, method, draw)
    return {name: _found(name, watched.get_submodule(name), method) for name in names}


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
    """Read what `save_amax` wrote, by name in alphabetical order.

    Raises:
        InputError: The file is anything else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, dict[str, Any]] = {}
    try:
        for key, tensor in sorted(load_file(path).items()):
            name, _, what = key.rpartition(".")
            found.setdefault(name, {})[what] = tensor if what == "smooth" else float(tensor)
        return {name: Amax(**values) for name, values in found.items()}
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is no calibration: {error}", "calibrate again") from error


def _watch(
    transformer: nn.Module, names: Sequence[str], method: str, draw: Callable[[nn.Module], None]
) -> nn.Module:
    """The transformer with Model Optimizer's quantisers, which have seen what `draw` draws.

    Everything is turned off before the linears are turned on by name, so nothing else slips in. As
    8-bit integers, because SmoothQuant skips all other formats; the largest values are the same.
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
            draw(model)

    try:
        # It warns of versions newer than itself, and prints what it inserted.
        with functions_restored(), quiet():
            optimizer = needed("modelopt.torch.quantization")
            watched: nn.Module = optimizer.quantize(transformer, config, loop)
    except AssertionError as error:  # its way to say that a value is not finite
        raise ModelError(
            f"Model Optimizer cannot calibrate this model: {error}",
            "load the model in bfloat16 or float32",
        ) from error
    return watched


def _own_weights(transformer: nn.Module, names: Sequence[str]) -> None:
    """Copies of the linears' weights, because SmoothQuant writes into them."""
    for name in names:
        linear: Any = transformer.get_submodule(name)
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)


def _found(name: str, linear: Any, method: str) -> Amax:
    """What the quantisers of a linear have seen."""
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
    """Put torch's functions back after Model Optimizer has run a model.

    It replaces functions of torch while a module runs, and leaves them replaced where the module
    raises. Everything in the process would then go through a quantiser without a meaning.
    """
    before = [(module, dict(vars(module))) for module in (torch, functional)]
    try:
        yield
    finally:
        for module, functions in before:
            for name, function in functions.items():
                if callable(function) and vars(module).get(name) is not function:
                    setattr(module, name, function)
                    if f"_{name}" not in functions:  # where it keeps the original
                        vars(module).pop(f"_{name}", None)
