"""Loads the export of a recipe's `[engine]`; makes it first if it is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.tensorrt.export import DTYPES
from hasten.engines.tensorrt.files import ENGINE, GRAPH
from hasten.engines.tensorrt.graph import float32_twin
from hasten.engines.tensorrt.keys import STAGES, content_key, weights_digest
from hasten.engines.tensorrt.manifest import Manifest, Shapes
from hasten.engines.tensorrt.preflight import ExportOptions
from hasten.engines.tensorrt.stages import export_tensorrt
from hasten.engines.tensorrt.step import INPUTS, graph_sizes, most_square
from hasten.engines.tensorrt.store import StageStore
from hasten.errors import EngineError, InputError
from hasten.families import family_of
from hasten.recipe import Engine, Sampling, parse_size
from hasten.user_files import expand_user

SIDE = 16  # pixels per token, along each side


class Driver(Protocol):
    """Runs the exported graph for one image: onnxruntime, or an engine on a GPU.

    Attributes:
        description: The runtime, its version and its device, for the summary.
    """

    description: str

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Compute the velocity, 1×S×C on any device, from inputs by name with a batch size of 1."""

    def close(self) -> None:
        """Free all resources; `run` is not called again."""


class EngineBody:
    """The body of a step on an engine.

    (latents B×S×C, embedded text B×T×D, modulation row B×width, cos, sin) -> velocity B×S×C.

    The engine processes one image, so the images of a batch run one after another.

    Args:
        driver: Runs the engine.
        shapes: The sizes that it was built for.

    Raises:
        EngineError: A call is outside the engine's profile.
    """

    def __init__(self, driver: Driver, shapes: Shapes) -> None:
        self.driver = driver
        self.shapes = shapes

    def __call__(
        self, latents: Tensor, text: Tensor, row: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        self._check(latents.shape[1], text.shape[1])
        images = []
        for one in range(len(latents)):
            given = (latents[one, None], text[one, None], row[one, None], cos, sin)
            images.append(self.driver.run(dict(zip(INPUTS, given, strict=True))))
        return torch.cat(images).to(latents.device, latents.dtype)

    def _check(self, image: int, text: int) -> None:
        shapes = self.shapes
        if text != shapes.text:
            raise EngineError(
                f"the engine was exported for {shapes.text} text tokens, and this call has {text}",
                f"call with max_sequence_length = {shapes.text}, or export again with another one",
            )
        if not shapes.least <= image <= shapes.most:
            raise EngineError(
                f"image size {_size(image)} is outside the engine's range: "
                f"{_size(shapes.least)} to {_size(shapes.most)}",
                "export again with --max-size WIDTHxHEIGHT (engine.max_size)"
                if image > shapes.most
                else "use a larger width and height",
            )


def load_body(pipe: Any, recipe: Engine, sampling: Sampling | None) -> EngineBody:
    """Load the engine of a recipe's `[engine]` on the pipeline's device.

    Without a path, missing stages of the export are made, which takes minutes for a large model.
    They are kept in the cache, and progress is logged.

    Args:
        pipe: A pipeline that is not optimised.
        recipe: The recipe's section.
        sampling: The number of steps to calibrate at and the text length of every call; by default,
            the model's own.

    Raises:
        EngineError: The export belongs to another model, is damaged, or has no engine for this GPU.
        InputError: There is no export at the path, or it has another precision.
    """
    target = _target(pipe.device) if recipe.kind == "tensorrt" else None
    if recipe.path is None:
        targets = () if target is None else (target,)
        options = ExportOptions(
            recipe.precision, targets, method=recipe.calibration, verify=recipe.verify
        )
        if recipe.max_size is not None:
            options = replace(options, max_size=parse_size(recipe.max_size, at_most=True))
        wanted = sampling or Sampling()
        length = wanted.max_sequence_length
        manifest = export_tensorrt(
            pipe, None, options, steps=wanted.steps, max_sequence_length=length
        )
    else:
        manifest = _written(pipe, recipe, target)
    assert manifest.folder is not None  # it was read from there
    driver = _driver(recipe.kind, manifest, manifest.folder, pipe.device)
    return EngineBody(driver, manifest.shapes)


def _driver(kind: str, manifest: Manifest, folder: Path, device: Any) -> Driver:
    if kind == "tensorrt":
        from hasten.engines.rtx import RtxEngine

        return RtxEngine(folder / ENGINE, device)
    if manifest.precision == "fp16":
        return OnnxRuntime(folder / GRAPH)

    def make(draft: Path) -> dict[str, Any]:
        float32_twin(folder / GRAPH, draft)
        return {}

    files = {name: facts.sha256 for name, facts in manifest.files.items() if GRAPH in name}
    key = content_key({"graph": files, "stages": STAGES})
    return OnnxRuntime(StageStore().stage("twin", key, make).folder / GRAPH)


def read_export(recipe: Engine, target: str | None) -> Manifest:
    """Read the export at the recipe's path and check its manifest and the sizes of its files.

    Args:
        recipe: A section with a path.
        target: The GPU that will run it, such as sm89; None without a GPU.

    Raises:
        InputError: There is no export at the path, or it has another precision.
        EngineError: The export is damaged or has no engine for this GPU.
    """
    folder = expand_user(recipe.path or "")
    manifest = Manifest.read(folder)
    if manifest.precision != recipe.precision:
        raise InputError(
            f"{folder} has {manifest.precision}, and engine.precision is {recipe.precision!r}",
            f'set engine.precision = "{manifest.precision}", or export again',
        )
    if target is not None and target not in manifest.targets:
        built = ", ".join(manifest.targets) or "no GPU"
        raise EngineError(
            f"{folder} has an engine for {built}, and this GPU is {target}",
            f"export again with --target {target}",
        )
    _refuse(folder, manifest.damaged(folder, read=False))
    return manifest


def _refuse(folder: Path, faults: Mapping[str, str]) -> None:
    """Raise EngineError if files of an export are missing or damaged."""
    if faults:
        raise EngineError(
            [f"{folder / name}: {fault}" for name, fault in faults.items()],
            f"export again: `hasten export tensorrt --out {folder}`",
        )


def _written(pipe: Any, recipe: Engine, target: str | None) -> Manifest:
    """Read the export at the recipe's path and check it against the recipe and the model."""
    manifest = read_export(recipe, target)
    folder = manifest.folder
    assert folder is not None  # it was read from there
    family = family_of(pipe)
    expected = {"family": family.name, **graph_sizes(pipe.transformer, family)}
    other = [
        f"{folder} has {name} {getattr(manifest, name)}, and this pipeline has {value}"
        for name, value in expected.items()
        if getattr(manifest, name) != value
    ]
    if other:
        raise EngineError(other, "export again from this model")
    _refuse(folder, manifest.damaged(folder))
    if manifest.weights != weights_digest(pipe.transformer, DTYPES[manifest.precision]):
        raise EngineError(
            f"{folder} was exported from weights that differ from this pipeline's",
            "load the model in the dtype that it was exported in, or export again from this model, "
            "with its LoRA adapters fused",
        )
    return manifest


def _target(device: Any) -> str:
    """The architecture of a GPU, such as sm89; `check` has ensured that there is a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _size(tokens: int) -> str:
    """The most square size with that many image tokens, and its number of pixels."""
    width, height = most_square(tokens)
    return f"{width * SIDE}x{height * SIDE} ({tokens * SIDE**2} pixels)"
