"""Checks everything that could stop an export before the first stage runs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hasten.check import empty_weights
from hasten.engines.tensorrt.folder import check_folder, closest_existing
from hasten.engines.tensorrt.packages import INSTALL, is_installed
from hasten.engines.tensorrt.targets import check_targets
from hasten.errors import Faults, InputError, UnsupportedError
from hasten.machine import Machine
from hasten.memory import format_bytes, status_bytes
from hasten.recipe import Engine, parse_size

METHODS: tuple[str, ...] = get_args(Engine.model_fields["calibration"].annotation)
LARGEST = (2048, 2048)  # default size of the largest image in pixels
PIXELS_PER_TOKEN = 16  # along each side
FEWEST_TOKENS = 4  # minimum for the largest image, because a profile needs a range

TEXT_TO_IMAGE = ("FluxPipeline", "FluxKontextPipeline")

BUILD_FACTOR = 2.5  # measured ratio of the builder's peak memory to the graph's weights
BUILD_BASE = 2**29  # bytes
SINGLE = 4  # bytes per value: the check runs in float32, once in onnxruntime and once in torch


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export.

    Attributes:
        precision: "bf16", "fp16" or "fp8".
        targets: GPUs, such as sm89; () for the graph alone.
        max_size: Width and height of the largest image in pixels.
        method: The FP8 calibration, "max" or "smoothquant".
        verify: Whether to compare the graph with torch.
    """

    precision: str
    targets: tuple[str, ...]
    max_size: tuple[int, int] = LARGEST
    method: str = METHODS[0]
    verify: bool = True

    @property
    def most_tokens(self) -> int:
        """Image tokens of the largest image."""
        width, height = self.max_size
        return (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)


def check_request(options: ExportOptions, out: Path | None, faults: Faults) -> None:
    """Collect the problems of a request that do not depend on the model.

    Imports neither torch nor the optional packages.

    Args:
        options: The options.
        out: The output folder; None for the cache.
        faults: Collects the problems.
    """
    for check in (_check_system, _check_packages, _check_size, _check_method, _check_targets):
        with faults.gather():
            check(options)
    if out is not None:
        with faults.gather():
            check_folder(out)


def check_exportable(
    options: ExportOptions,
    transformer: Any,
    family: Any,
    places: Mapping[Path, float],
    machine: Machine,
    faults: Faults,
) -> None:
    """Collect the problems of exporting a transformer: adapters, weights, memory and disk space.

    Args:
        options: The options.
        transformer: The transformer.
        family: Its family.
        places: Folders to write to, with the required space in multiples of the graph's size.
        machine: The machine.
        faults: Collects the problems.
    """
    from hasten.engines.tensorrt.export import refuse_adapters

    with faults.gather():
        refuse_adapters(transformer)
    with faults.gather():
        if problem := empty_weights(transformer):
            raise UnsupportedError(*problem)
    with faults.gather():
        _refuse_special_weights(
            transformer, "transformer", "the export quantises it itself (--precision fp8)"
        )
    if options.precision not in get_args(Engine.model_fields["precision"].annotation):
        return  # already reported, and the size depends on it
    weights = graph_bytes(transformer, family, options.precision)
    with faults.gather():
        _check_memory(options, weights, _parameters(transformer, family), machine)
    with faults.gather():
        _check_disk(weights, places)


def check_text_to_image(pipe: Any) -> None:
    """Check that a pipeline generates images from text alone, as the FP8 calibration needs.

    Raises:
        UnsupportedError: It needs other inputs, or its text encoders are missing or quantised.
    """
    name = type(pipe).__name__
    if name not in TEXT_TO_IMAGE:
        raise UnsupportedError(
            f"fp8 is calibrated by generating images from text, and {name} needs other inputs",
            f"optimise a {TEXT_TO_IMAGE[0]}, then create yours from it: fast.from_pipe({name})",
        )
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "text_encoder_2", None) is None:
        raise UnsupportedError(
            "fp8 is calibrated by generating images, and the pipeline has no text encoders",
            "load it with its text encoders",
        )
    for encoder in ("text_encoder", "text_encoder_2"):
        _refuse_special_weights(
            getattr(pipe, encoder), encoder, "the calibration is cached by the weights' values"
        )


def graph_bytes(transformer: Any, family: Any, precision: str) -> int:
    """Estimate the bytes of the weights in a graph.

    Modulations are not part of a graph. In FP8, quantised weights take one byte each. The estimate
    is slightly too high because it includes the text embedding.
    """
    halves = 2 * _parameters(transformer, family)
    if precision != "fp8":
        return halves
    return halves - sum(int(linear.weight.numel()) for _, linear in family.quantizable(transformer))


def _refuse_special_weights(model: Any, label: str, reason: str) -> None:
    """Raise UnsupportedError for weights that another library has quantised."""
    import torch

    from hasten.quantization.plan import PLAIN_DTYPES, special_weight

    dtypes = (*PLAIN_DTYPES, torch.float64)
    special = [
        f"{name} is {why}"
        for name, weight in model.named_parameters()
        if (why := special_weight(weight, dtypes))
    ]
    if special:
        raise UnsupportedError(
            f"{len(special)} weights of the {label} are already quantised; {special[0]}",
            f"load the plain model: {reason}",
        )


def _parameters(transformer: Any, family: Any) -> int:
    norms = [norm for _, norm in family.modulated_norms(transformer)]
    modulations = sum(p.numel() for norm in norms for p in norm.linear.parameters())
    return int(sum(p.numel() for p in transformer.parameters()) - modulations)


def _check_system(_: ExportOptions) -> None:
    if sys.platform != "linux":
        raise UnsupportedError(
            f"engines can only be exported on Linux, and this is {sys.platform}",
            "run it on Linux, or on Windows in WSL 2",
        )


def _check_packages(options: ExportOptions) -> None:
    wanted = {
        "onnx": True,
        "onnx_ir": True,
        "onnxscript": True,
        "onnxruntime": options.verify,
        "tensorrt_rtx": bool(options.targets),
        "modelopt": options.precision == "fp8",
    }
    missing = [name for name, wants in wanted.items() if wants and not is_installed(name)]
    if missing:
        raise UnsupportedError(f"not installed: {', '.join(missing)}", INSTALL)


def _check_size(options: ExportOptions) -> None:
    width, height = options.max_size
    parse_size(f"{width}x{height}", at_most=True)
    if options.most_tokens < FEWEST_TOKENS:
        raise InputError(
            f"the largest size {width}x{height} is too small for an engine",
            "use at least 32x32; the default is 2048x2048",
        )


def _check_method(options: ExportOptions) -> None:
    if options.method not in METHODS:
        raise InputError(
            f"unknown calibration {options.method!r}", f"use one of {', '.join(METHODS)}"
        )


def _check_targets(options: ExportOptions) -> None:
    check_targets(options.targets, options.precision)


def _check_memory(options: ExportOptions, weights: int, parameters: int, machine: Machine) -> None:
    if machine.ram_bytes is None:
        return
    ours = status_bytes("RssAnon") or 0
    needs = {"exporting": ours + BUILD_BASE}
    if options.targets:
        needs["building"] = ours + int(BUILD_FACTOR * weights) + BUILD_BASE
    if options.verify:
        needs["checking the graph"] = ours + 2 * SINGLE * parameters
    phase = max(needs, key=needs.__getitem__)
    if needs[phase] <= machine.ram_bytes:
        return
    fix = "use a machine with more memory, or the model in bfloat16 (--dtype)"
    if phase == "checking the graph":
        fix += ", or skip the check: --no-verify (engine.verify = false)"
    raise UnsupportedError(
        f"{phase} takes about {format_bytes(needs[phase])} of memory, and this machine has "
        f"{format_bytes(machine.ram_bytes)}",
        fix,
    )


def _check_disk(weights: int, places: Mapping[Path, float]) -> None:
    """Raise UnsupportedError if a disk has too little free space for all of its folders."""
    needed: dict[int, float] = {}
    sample: dict[int, Path] = {}
    for place, times in places.items():
        existing = closest_existing(place)
        device = existing.stat().st_dev
        needed[device] = needed.get(device, 0) + times * weights
        sample[device] = existing
    for device, bytes_needed in needed.items():
        free = shutil.disk_usage(sample[device]).free
        if free < bytes_needed:
            raise UnsupportedError(
                f"the export takes about {format_bytes(bytes_needed)} on the disk of "
                f"{sample[device]}, which has {format_bytes(free)} free",
                "free some space, or choose another --out, or set HASTEN_CACHE to another disk",
            )
