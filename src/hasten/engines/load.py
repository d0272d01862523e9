"""From a recipe's `[engine]` to the body that runs: find or make the export, load its driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.engines.body import Driver, EngineBody
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.tensorrt.digests import weights_digest
from hasten.engines.tensorrt.files import ENGINE, GRAPH
from hasten.engines.tensorrt.hashes import content_key
from hasten.engines.tensorrt.manifest import Manifest
from hasten.engines.tensorrt.stages import export_tensorrt
from hasten.engines.tensorrt.step import Shapes
from hasten.engines.tensorrt.store import Store
from hasten.engines.tensorrt.twin import float32_twin
from hasten.engines.tensorrt.versions import STAGES
from hasten.errors import EngineError, InputError
from hasten.recipe import Engine, Sampling, parse_size
from hasten.user_files import expand_user

__all__ = ["load_body", "read_export"]


def load_body(
    pipe: Any,
    recipe: Engine,
    sampling: Sampling | None,
    *,
    tell: Callable[[str], None],
    show: Callable[[str], None],
) -> EngineBody:
    """The engine that `[engine]` asks for, on the pipeline's device.

    sampling: steps to calibrate at and the text length of every call, the model's own by default.

    Without a path, what is missing of the export is made, which takes minutes for a large model,
    and kept for the next time; `tell` hears each finished stage, `show` what goes on inside one.
    Raises EngineError or InputError where the export is of another model or precision, damaged, or
    has no engine for this GPU.
    """
    target = _target(pipe.device) if recipe.kind == "tensorrt" else None
    if recipe.path is None:
        manifest = export_tensorrt(
            pipe,
            None,
            precision=recipe.precision,
            targets=() if target is None else (target,),
            max_size=None if recipe.max_size is None else parse_size(recipe.max_size, at_most=True),
            method=recipe.calibration,
            steps=None if sampling is None else sampling.steps,
            max_sequence_length=None if sampling is None else sampling.max_sequence_length,
            verify=recipe.verify,
            tell=tell,
            show=show,
        )
    else:
        manifest = _written(pipe, recipe, target)
    assert manifest.folder is not None  # it was read from there
    driver = _driver(recipe.kind, manifest, manifest.folder, pipe.device, tell)
    tokens = manifest.shapes
    return EngineBody(driver, Shapes(tokens.text, tokens.least, tokens.best, tokens.most))


def _driver(
    kind: str, manifest: Manifest, folder: Path, device: Any, tell: Callable[[str], None]
) -> Driver:
    if kind == "tensorrt":
        from hasten.engines.rtx import RtxEngine

        return RtxEngine(folder / ENGINE, device)
    if manifest.precision == "fp16":
        return OnnxRuntime(folder / GRAPH)
    files = {name: entry.sha256 for name, entry in manifest.files.items() if GRAPH in name}

    def make(draft: Path) -> dict[str, Any]:
        float32_twin(folder / GRAPH, draft)
        return {}

    key = content_key({"graph": files, "stages": STAGES})
    return OnnxRuntime(Store(tell=tell).stage("twin", key, make).folder / GRAPH)


def read_export(recipe: Engine, target: str | None) -> Manifest:
    """What lies at the recipe's path, by its manifest and the sizes of its files.

    target: of the GPU that is to run it, None where there is none. Raises InputError or EngineError
    where no whole export is there, or one of another precision or for other GPUs.
    """
    folder = expand_user(recipe.path or "")
    manifest = Manifest.read(folder)
    if manifest.precision != recipe.precision:
        raise InputError(
            f"{folder} holds {manifest.precision}, and engine.precision is {recipe.precision!r}",
            f'set engine.precision = "{manifest.precision}", or export anew',
        )
    if target is not None and target not in manifest.targets:
        built = ", ".join(manifest.targets) or "no GPU"
        raise EngineError(
            f"{folder} has an engine for {built}, and this GPU is {target}",
            f"export anew with --target {target}",
        )
    _refuse(folder, manifest.other_size(folder))
    return manifest


def _refuse(folder: Path, faults: Mapping[str, str]) -> None:
    """EngineError where files of an export are missing or damaged."""
    if faults:
        raise EngineError(
            [f"{folder / name}: {fault}" for name, fault in faults.items()],
            f"export again: `hasten export tensorrt --out {folder}`",
        )


def _written(pipe: Any, recipe: Engine, target: str | None) -> Manifest:
    """What `hasten export tensorrt` wrote, held to the recipe, the model and its own files."""
    manifest = read_export(recipe, target)
    folder = manifest.folder
    assert folder is not None  # it was read from there
    _refuse(folder, manifest.damaged(folder))
    if manifest.weights != weights_digest(pipe.transformer):
        raise EngineError(
            f"{folder} was exported from other weights than this pipeline's",
            "load it in the dtype that it was exported in, or export anew from this model, with "
            "its LoRA adapters fused",
        )
    return manifest


def _target(device: Any) -> str:
    """The GPU's own, such as sm89; `check` has seen to it that there is one."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
