"""All stages of an export: preflight → calibrate → export → verify → build → write.

The result of each stage is stored under a key of everything that it depends on. So an interrupted
export resumes at the first unfinished stage, and changed options repeat only the affected stages.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.check import refuse_optimized
from hasten.engines.tensorrt import PROMPTS
from hasten.engines.tensorrt.build import build
from hasten.engines.tensorrt.calibrate import calibrate_fp8, load_amax, save_amax
from hasten.engines.tensorrt.export import DTYPES, export_onnx
from hasten.engines.tensorrt.files import AMAX, ENGINE, GRAPH
from hasten.engines.tensorrt.folder import resolved, write_export
from hasten.engines.tensorrt.keys import (
    STAGES,
    config_of,
    content_key,
    pipeline_digest,
    versions,
    weights_digest,
)
from hasten.engines.tensorrt.manifest import (
    CalibrationFacts,
    Manifest,
    Shapes,
    Stage,
    Verification,
)
from hasten.engines.tensorrt.nodes import Amax
from hasten.engines.tensorrt.preflight import (
    ExportOptions,
    check_exportable,
    check_request,
    check_text_to_image,
)
from hasten.engines.tensorrt.step import graph_sizes
from hasten.engines.tensorrt.store import Done, StageStore
from hasten.engines.tensorrt.verify import verify
from hasten.errors import EngineError, Faults
from hasten.families import family_of
from hasten.families.family import Family
from hasten.log import logger
from hasten.machine import machine, version_of
from hasten.memory import PeakMemory, ran_out
from hasten.models.defaults import ModelDefaults, defaults_for
from hasten.prompts import read_prompts
from hasten.recipe import Sampling
from hasten.settings import Settings

FIX_MEMORY = (
    "free some memory, use a machine with more, or raise its limit (ulimit, container); then run "
    "it again: finished stages are kept"
)
FEW_STEPS = 4
LEAST_TOKENS = 64  # of the smallest image, 128x128, unless the model's own size is smaller
# Required disk space in multiples of the graph's size: of the store, with graph, engine and the
# float32 graph; of an output folder; and of the store's exports, where the engine is a hard link.
IN_STORE, IN_OUT, IN_EXPORTS = 6.0, 2.0, 1.0


def export_tensorrt(
    pipe: Any,
    out: Path | None,
    options: ExportOptions,
    *,
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    max_sequence_length: int | None = None,
    model: str | None = None,
) -> Manifest:
    """Export the transformer of a pipeline, build one engine for all targets, and write both.

    The pipeline is not changed. Finished stages are kept and reused; a failed export leaves `out`
    unchanged. Finished stages and damaged files are logged at INFO, progress within a stage at
    DEBUG.

    Args:
        pipe: A pipeline that is not optimised.
        out: The output folder; None writes to the cache, and `Manifest.folder` is the path.
        options: The options of the export.
        prompts: Prompts for the FP8 calibration; by default, those of the model.
        steps: The number of steps of the FP8 calibration; by default, that of the model.
        max_sequence_length: Text tokens of every call; by default, those of the model.
        model: The model's name in the manifest.

    Returns:
        The manifest of the export, with its folder.

    Raises:
        HastenError: The export is not possible; all problems are listed before any stage runs.
        EngineError: A stage failed.
    """
    started = time.perf_counter()
    store = StageStore()
    family, out = _preflight(pipe, options, out, store)
    defaults = _defaults(pipe)
    sampling = Sampling(steps=steps, max_sequence_length=max_sequence_length)
    settings = Settings.of_model(defaults).under(sampling)
    _log_own_size(options, settings)
    texts = list(prompts or read_prompts(defaults.prompts, limit=PROMPTS))
    weights = weights_digest(pipe.transformer, DTYPES[options.precision])
    export = _Export(pipe, family, options, settings, texts, store, weights)
    _log_stage("preflight", started)
    return export.run(model or _name(pipe), out)


def _preflight(
    pipe: Any, options: ExportOptions, out: Path | None, store: StageStore
) -> tuple[Family, Path | None]:
    """Check everything that could stop the export; return the family and the resolved `out`."""
    faults = Faults()
    check_request(options, out, faults)
    with faults.gather():
        out = None if out is None else resolved(out)
    with faults.gather():
        refuse_optimized(pipe)
    if options.precision == "fp8":
        with faults.gather():
            check_text_to_image(pipe)
    family: Any = None
    with faults.gather():
        family = family_of(pipe)
    places = {store.root: IN_STORE}
    places |= {out: IN_OUT} if out else {store.root / "exports": IN_EXPORTS}
    if family is not None:
        check_exportable(options, pipe.transformer, family, places, machine(), faults)
    faults.raise_any()
    return family, out


@dataclass
class _Export:
    """One export in progress.

    Attributes:
        weights: The transformer's digest in the precision's dtype.
        done: The finished stages by name, in order.
    """

    pipe: Any
    family: Family
    options: ExportOptions
    settings: Settings
    prompts: list[str]
    store: StageStore
    weights: str
    done: dict[str, Done] = field(default_factory=dict)

    def run(self, model: str, out: Path | None) -> Manifest:
        options, shapes = self.options, self.shapes.model_dump()
        if options.precision == "fp8":
            key: dict[str, Any] = {
                "pipeline": pipeline_digest(self.pipe, self.weights),
                "method": options.method,
                "prompts": self.prompts,
                "arguments": self.settings.call_arguments(),
            }
            self.stage("calibrate", key, self.calibrate)
        key = {
            "config": config_of(self.pipe.transformer),
            "weights": self.weights,
            "precision": options.precision,
            "amax": self.digests("calibrate"),
            "text": self.settings.max_sequence_length,
        }
        self.stage("export", key, self.export)
        graph = {"graph": self.digests("export"), "shapes": shapes}
        if options.verify:
            key = {**graph, "weights": self.weights, "amax": self.digests("calibrate")}
            self.stage("verify", key, self.verify)
        if options.targets:
            self.stage("build", {**graph, "targets": options.targets}, self.build)
        start = time.perf_counter()
        files = {name: done.folder / name for done in self.done.values() for name in done.files}
        written = write_export(self.manifest(model), files, out, self.store)
        _log_stage("write", start)
        return written

    def calibrate(self, folder: Path) -> dict[str, Any]:
        method, arguments = self.options.method, self.settings.call_arguments()
        amax = calibrate_fp8(self.pipe, self.family, self.prompts, method=method, **arguments)
        save_amax(amax, folder / AMAX)
        return {}

    def export(self, folder: Path) -> dict[str, Any]:
        precision, transformer = self.options.precision, self.pipe.transformer
        export_onnx(transformer, self.family, precision, self.amax(), self.shapes, folder)
        return {}

    def verify(self, folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            verification = verify(
                self.pipe.transformer,
                self.family,
                self.done["export"].folder / GRAPH,
                self.options.precision,
                self.amax(),
                self.shapes,
                Path(scratch),
            )
        return {"verification": verification.model_dump(mode="json")}

    def build(self, folder: Path) -> dict[str, Any]:
        graph = self.done["export"].folder / GRAPH
        built = build(graph, folder / ENGINE, self.options.targets, self.shapes)
        return {"peak_bytes": built.peak_bytes}

    def amax(self) -> dict[str, Amax] | None:
        done = self.done.get("calibrate")
        return None if done is None else load_amax(done.folder / AMAX)

    def digests(self, name: str) -> dict[str, str]:
        """sha256 of a stage's files; empty if the stage is not part of this export."""
        done = self.done.get(name)
        return {} if done is None else {file: facts.sha256 for file, facts in done.files.items()}

    def stage(self, name: str, key: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> None:
        """Run a stage, or reuse its stored result; time and log it."""

        def watched(folder: Path) -> dict[str, Any]:
            with PeakMemory() as peak:
                try:
                    facts = make(folder)
                except Exception as error:
                    if ran_out(error):
                        raise EngineError(f"{name}: out of memory", FIX_MEMORY) from error
                    raise
            return {"peak_bytes": peak.bytes, **facts}

        logger.debug(name)
        full_key = {**key, "stages": STAGES, "versions": versions(name)}
        start = time.perf_counter()
        done = self.store.stage(name, content_key(full_key), watched)
        _log_stage(name, start, cached=done.cached)
        self.done[name] = done

    @property
    def shapes(self) -> Shapes:
        most, own = self.options.most_tokens, _own_tokens(self.settings)
        least = min(LEAST_TOKENS, own, most // 2)
        text = self.settings.max_sequence_length
        return Shapes(text=text, least=least, best=max(least, min(own, most)), most=most)

    def manifest(self, model: str) -> Manifest:
        calibration, verification = None, None
        if done := self.done.get("calibrate"):
            calibration = CalibrationFacts(
                method=self.options.method,
                prompts=len(self.prompts),
                steps=self.settings.steps,
                sha256=done.files[AMAX].sha256,
            )
        if done := self.done.get("verify"):
            verification = Verification.model_validate(done.facts["verification"])
        sizes: Any = graph_sizes(self.pipe.transformer, self.family)
        return Manifest(
            hasten=version_of("hasten") or "not installed",
            model=model,
            family=self.family.name,
            weights=self.weights,
            precision=self.options.precision,  # type: ignore[arg-type]  # checked by preflight
            targets=self.options.targets,
            shapes=self.shapes,
            **sizes,
            calibration=calibration,
            files={
                name: facts for done in self.done.values() for name, facts in done.files.items()
            },
            stages=tuple(
                Stage(
                    name=name,
                    seconds=done.seconds,
                    peak_bytes=done.facts["peak_bytes"],
                    cached=done.cached,
                )
                for name, done in self.done.items()
            ),
            verification=verification,
            versions=versions(),
        )


def _log_stage(name: str, start: float, *, cached: bool = False) -> None:
    seconds = time.perf_counter() - start
    logger.info(f"{name:<10}{seconds:7.1f} s{'  (cached)' if cached else ''}")


def _log_own_size(options: ExportOptions, settings: Settings) -> None:
    """Log a note if the model's own size is too large for the engine."""
    if _own_tokens(settings) > options.most_tokens:
        most = "x".join(map(str, options.max_size))
        own = f"{settings.width}x{settings.height}"
        logger.info(
            f"note: the engine supports images up to {most}, and the model's own size is {own}: "
            f"use a smaller size in each call, or --max-size {own} (engine.max_size)"
        )


def _own_tokens(settings: Settings) -> int:
    return (settings.width // 16) * (settings.height // 16)


def _defaults(pipe: Any) -> ModelDefaults:
    """The defaults of the model's directory, completed by those of the pipeline."""
    name = getattr(pipe, "name_or_path", None)
    defaults = defaults_for(name) if name else ModelDefaults()
    side = pipe.default_sample_size * pipe.vae_scale_factor
    own: dict[str, Any] = {"width": side, "height": side}
    if not pipe.transformer.config.guidance_embeds:  # schnell: distilled to a few steps
        own["steps"] = FEW_STEPS
    missing = own.keys() - defaults.model_fields_set
    return defaults.model_copy(update={name: own[name] for name in missing})


def _name(pipe: Any) -> str:
    """The name that the pipeline was loaded by; of a path, only the last part is used."""
    return Path(getattr(pipe, "name_or_path", None) or type(pipe).__name__).name
