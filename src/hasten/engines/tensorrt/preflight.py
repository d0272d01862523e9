"""What would stop an export, all of it at once, before anything is made."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hasten.check import empty_weights
from hasten.engines.tensorrt.folder import check_folder, nearest
from hasten.engines.tensorrt.packages import INSTALL, is_installed
from hasten.engines.tensorrt.targets import check_targets
from hasten.errors import Faults, InputError, UnsupportedError
from hasten.machine import Machine
from hasten.memory import format_bytes, status_bytes
from hasten.recipe import Engine, parse_size

METHODS: tuple[str, ...] = get_args(Engine.model_fields["calibration"].annotation)
LARGEST = (2048, 2048)  # pixels of the largest image, by default
PIXELS_A_TOKEN = 16  # along each side
FEWEST_TOKENS = 4  # of the largest image: a profile needs a range

TEXT_TO_IMAGE = ("FluxPipeline", "FluxKontextPipeline")

BUILD_FACTOR = 2.5  # peak of the builder by the bytes of the graph's weights, measured
BUILD_BASE = 2**29  # bytes
SINGLE = 4  # bytes: the check runs in float32, once in onnxruntime and once in torch


@dataclass(frozen=True)
class ExportOptions:
    """What is to be exported.

    Attributes:
        precision: bf16, fp16 or fp8.
        targets: GPUs, such as sm89; () for the graph alone.
        max_size: Width and height of the largest image in pixels.
        method: How FP8 is calibrated.
        verify: Whether the graph is compared with torch.
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
        return (width // PIXELS_A_TOKEN) * (height // PIXELS_A_TOKEN)


def check_request(options: ExportOptions, out: Path | None, faults: Faults) -> None:
    """Note what is wrong with the request, whatever the model. Loads neither torch nor packages."""
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
    """Note what is wrong with exporting this transformer here: adapters, weights that another
    library has quantised, memory, disk.

    places: folders with how many times the graph's bytes each has to take.
    """
    from hasten.engines.tensorrt.export import refuse_adapters

    with faults.gather():
        refuse_adapters(transformer)
    with faults.gather():
        if trouble := empty_weights(transformer):
            raise UnsupportedError(*trouble)
    with faults.gather():
        _refuse_special_weights(
            transformer, "transformer", "FP8 is made by the export itself (--precision fp8)"
        )
    if options.precision not in get_args(Engine.model_fields["precision"].annotation):
        return  # noted already, and there is no size without it
    weights = graph_bytes(transformer, family, options.precision)
    with faults.gather():
        _check_memory(options, weights, _parameters(transformer, family), machine)
    with faults.gather():
        _check_disk(weights, places)


def check_draws(pipe: Any) -> None:
    """Raise where a pipeline cannot draw from a text alone, as the calibration of FP8 does."""
    name = type(pipe).__name__
    if name not in TEXT_TO_IMAGE:
        raise UnsupportedError(
            f"fp8 is calibrated by drawing from texts, and {name} wants more than that",
            f"optimise a {TEXT_TO_IMAGE[0]}, then make yours from it: fast.from_pipe({name})",
        )
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "text_encoder_2", None) is None:
        raise UnsupportedError(
            "fp8 is calibrated by drawing from texts, and the pipeline has no text encoders",
            "load it with its text encoders",
        )
    for what in ("text_encoder", "text_encoder_2"):
        _refuse_special_weights(
            getattr(pipe, what), what, "what was calibrated is kept by the values of its weights"
        )


def graph_bytes(transformer: Any, family: Any, precision: str) -> int:
    """Bytes of the weights in the graph, a little too many: what makes the text's embedding is
    counted too. Modulations are not in it; FP8 holds a byte for each weight that it quantises."""
    halves = 2 * _parameters(transformer, family)
    if precision != "fp8":
        return halves
    return halves - sum(int(linear.weight.numel()) for _, linear in family.quantizable(transformer))


def _refuse_special_weights(model: Any, what: str, because: str) -> None:
    """UnsupportedError for weights that another library has quantised, or keeps in fewer bits."""
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
            f"{len(special)} weights of the {what} are quantised already; {special[0]}",
            f"load the plain model: {because}",
        )


def _parameters(transformer: Any, family: Any) -> int:
    norms = [norm for _, norm in family.modulated_norms(transformer)]
    modulations = sum(p.numel() for norm in norms for p in norm.linear.parameters())
    return int(sum(p.numel() for p in transformer.parameters()) - modulations)


def _check_system(_: ExportOptions) -> None:
    if sys.platform != "linux":
        raise UnsupportedError(
            f"engines are exported on Linux, and this is {sys.platform}",
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
            "32x32 is the smallest, 2048x2048 the default",
        )


def _check_method(options: ExportOptions) -> None:
    if options.method not in METHODS:
        raise InputError(
            f"no calibration is called {options.method!r}", f"one of {', '.join(METHODS)}"
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
    what = max(needs, key=needs.__getitem__)
    if needs[what] <= machine.ram_bytes:
        return
    fix = "use a machine with more memory, or the model in bfloat16 (--dtype)"
    if what == "checking the graph":
        fix += ", or leave the check out: --no-verify (engine.verify = false)"
    raise UnsupportedError(
        f"{what} takes about {format_bytes(needs[what])} of memory, "
        f"this machine has {format_bytes(machine.ram_bytes)}",
        fix,
    )


def _check_disk(weights: int, places: Mapping[Path, float]) -> None:
    """Folders on one disk share what it has."""
    needed: dict[int, float] = {}
    sample: dict[int, Path] = {}
    for place, times in places.items():
        existing = nearest(place)
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
