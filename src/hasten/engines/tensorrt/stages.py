"""The whole way to an engine: preflight → calibrate → export → verify → build → write.

Each stage is kept under a key of everything that it depends on, so that an interrupted export goes
on where it was, and one that differs in part repeats only that part. Importing this loads no torch.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.check import refuse_optimized
from hasten.engines.tensorrt import PROMPTS
from hasten.engines.tensorrt.build import build
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
    FileEntry,
    Manifest,
    Shapes,
    Stage,
    Verification,
)
from hasten.engines.tensorrt.preflight import (
    METHODS,
    ExportOptions,
    check_draws,
    check_exportable,
    check_request,
)
from hasten.engines.tensorrt.store import Done, StageStore, Tell
from hasten.errors import EngineError, Faults
from hasten.machine import machine, version_of
from hasten.memory import PeakMemory, ran_out
from hasten.models.defaults import ModelDefaults, defaults_for
from hasten.prompts import read_prompts
from hasten.recipe import Sampling
from hasten.settings import Settings

if TYPE_CHECKING:
    from hasten.families.family import Family

__all__ = ["export_tensorrt"]

FIX_MEMORY = (
    "free some memory, use a machine with more, or raise its limit (ulimit, container); then run "
    "it again: finished stages are kept"
)
FEW_STEPS = 4
LEAST_TOKENS = 64  # of the smallest image, 128x128, unless the model's own is smaller
# Times the graph's bytes that the store takes: graph, engine and the float32 twin; and out, whose
# engine takes no room of its own in the store.
IN_STORE, IN_OUT, IN_EXPORTS = 6.0, 2.0, 1.0


def export_tensorrt(
    pipe: Any,
    out: Path | None,
    *,
    precision: str,
    targets: Sequence[str],
    max_size: tuple[int, int] | None = None,
    method: str = METHODS[0],
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    max_sequence_length: int | None = None,
    verify: bool = True,
    model: str | None = None,
    tell: Tell = lambda _: None,
    show: Tell = lambda _: None,
) -> Manifest:
    """Export the transformer of a pipeline, build one engine for all targets, and write both.

    The pipeline stays as it was. Finished stages are kept, so that a repeat goes on after them;
    `out` is written whole or not at all.

    Args:
        pipe: A pipeline that is not optimised.
        out: A folder; None keeps the export in the cache, where `Manifest.folder` says.
        precision: bf16, fp16 or fp8.
        targets: GPUs, such as sm89; () for the graph alone.
        max_size: Width and height in pixels of the largest image.
        method: How FP8 is calibrated: max or smoothquant.
        prompts: To calibrate FP8 with; the model's own by default.
        steps: To calibrate FP8 at; the model's own by default.
        max_sequence_length: Text tokens of every call; the model's own by default.
        verify: Whether to compare the graph with torch.
        model: The model's name for the manifest.
        tell: Reports each finished stage in a line, and files that were damaged.
        show: Reports progress within a stage.

    Returns:
        What was written, with its folder.

    Raises:
        HastenError: Everything that would stop it, at once and before anything is made.
        EngineError: A stage failed.
    """
    given = {} if max_size is None else {"max_size": max_size}
    options = ExportOptions(precision, tuple(targets), method=method, verify=verify, **given)
    started = time.perf_counter()
    store = StageStore(tell=tell)
    family, out = _preflight(pipe, options, out, store)
    settings = _settings(pipe, Sampling(steps=steps, max_sequence_length=max_sequence_length))
    _note_own_size(options, settings, tell)
    from hasten.engines.tensorrt.export import DTYPES

    texts = list(prompts or read_prompts(_defaults(pipe).prompts, limit=PROMPTS))
    weights = weights_digest(pipe.transformer, DTYPES[precision])
    export = _Export(pipe, family, options, settings, texts, store, weights, tell, show)
    _report(tell, "preflight", time.perf_counter() - started)
    return export.run(model or _name(pipe), out)


def _preflight(
    pipe: Any, options: ExportOptions, out: Path | None, store: StageStore
) -> tuple[Family, Path | None]:
    """The pipeline's family and where `out` leads to; raises all that would stop the export."""
    faults = Faults()
    check_request(options, out, faults)
    with faults.gather():
        out = None if out is None else resolved(out)
    with faults.gather():
        refuse_optimized(pipe)
    if options.precision == "fp8":
        with faults.gather():
            check_draws(pipe)
    family = _family(pipe, faults)
    places = {store.root: IN_STORE}
    places |= {out: IN_OUT} if out else {store.root / "exports": IN_EXPORTS}
    if family is not None:
        check_exportable(options, pipe.transformer, family, places, machine(), faults)
    faults.raise_any()
    assert family is not None  # else a fault was raised
    return family, out


@dataclass
class _Export:
    """One export in progress; weights: the transformer's digest in the precision's dtype."""

    pipe: Any
    family: Family
    options: ExportOptions
    settings: Settings
    prompts: list[str]
    store: StageStore
    weights: str
    tell: Tell
    show: Tell
    stages: list[Stage] = field(default_factory=list)

    def run(self, model: str, out: Path | None) -> Manifest:
        calibrated = self.calibrate() if self.options.precision == "fp8" else None
        graph = self.export(calibrated)
        verification = self.verify(graph, calibrated) if self.options.verify else None
        made = [done for done in (calibrated, graph) if done is not None]
        if self.options.targets:
            made.append(self.build(graph))
        start = time.perf_counter()
        manifest = self.manifest(model, made, calibrated, verification)
        files = {name: done.folder / name for done in made for name in done.files}
        written = write_export(manifest, files, out, self.store)
        _report(self.tell, "write", time.perf_counter() - start)
        return written

    def calibrate(self) -> Done:
        arguments = self.settings.call_arguments()
        key = {
            "pipeline": pipeline_digest(self.pipe, self.weights),
            "method": self.options.method,
            "prompts": self.prompts,
            "arguments": arguments,
        }

        def make(folder: Path) -> dict[str, Any]:
            from hasten.engines.tensorrt.calibrate import calibrate, save

            amax = calibrate(
                self.pipe,
                self.family,
                self.prompts,
                method=self.options.method,
                tell=self.show,
                **arguments,
            )
            save(amax, folder / AMAX)
            return {}

        return self.stage("calibrate", key, make)

    def export(self, calibrated: Done | None) -> Done:
        transformer = self.pipe.transformer
        key = {
            "config": config_of(transformer),
            "weights": self.weights,
            "precision": self.options.precision,
            "amax": _digests(calibrated),
            "text": self.settings.max_sequence_length,
        }

        def make(folder: Path) -> dict[str, Any]:
            from hasten.engines.tensorrt.export import export_onnx

            precision, amax = self.options.precision, _load(calibrated)
            export_onnx(transformer, self.family, precision, amax, self.shapes, folder)
            return {}

        return self.stage("export", key, make)

    def verify(self, graph: Done, calibrated: Done | None) -> Verification:
        key = {
            "graph": _digests(graph),
            "weights": self.weights,
            "amax": _digests(calibrated),
            "shapes": self.shapes.model_dump(),
        }

        def make(folder: Path) -> dict[str, Any]:
            from hasten.engines.tensorrt.verify import verify

            scratch = folder / "scratch"
            scratch.mkdir()
            found = verify(
                self.pipe.transformer,
                self.family,
                graph.folder / GRAPH,
                self.options.precision,
                _load(calibrated),
                self.shapes,
                scratch,
                self.show,
            )
            shutil.rmtree(scratch)
            return {"verification": found.model_dump(mode="json")}

        done = self.stage("verify", key, make)
        return Verification.model_validate(done.facts["verification"])

    def build(self, graph: Done) -> Done:
        key = {
            "graph": _digests(graph),
            "targets": self.options.targets,
            "shapes": self.shapes.model_dump(),
        }

        def make(folder: Path) -> dict[str, Any]:
            targets, path = self.options.targets, graph.folder / GRAPH
            built = build(path, folder / ENGINE, targets, self.shapes, self.show)
            return {"peak_bytes": built.peak_bytes}

        return self.stage("build", key, make)

    def stage(self, name: str, key: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> Done:
        """One stage of the store under its whole key, timed and reported."""

        def watched(folder: Path) -> dict[str, Any]:
            with PeakMemory() as peak:
                try:
                    facts = make(folder)
                except Exception as error:
                    if ran_out(error):
                        raise EngineError(f"{name}: out of memory", FIX_MEMORY) from error
                    raise
            return {"peak_bytes": peak.bytes, **facts}

        self.show(name)
        whole = {**key, "stages": STAGES, "versions": versions(name)}
        start = time.perf_counter()
        done = self.store.stage(name, content_key(whole), watched)
        _report(self.tell, name, time.perf_counter() - start, cached=done.cached)
        peak = done.facts["peak_bytes"]
        self.stages.append(
            Stage(name=name, seconds=done.seconds, peak_bytes=peak, cached=done.cached)
        )
        return done

    @property
    def shapes(self) -> Shapes:
        most, own = self.options.most_tokens, _own_tokens(self.settings)
        least = min(LEAST_TOKENS, own, most // 2)
        text = self.settings.max_sequence_length
        return Shapes(text=text, least=least, best=max(least, min(own, most)), most=most)

    def manifest(
        self,
        model: str,
        made: Sequence[Done],
        calibrated: Done | None,
        verification: Verification | None,
    ) -> Manifest:
        from hasten.engines.tensorrt.step import graph_sizes

        calibration = calibrated and CalibrationFacts(
            method=self.options.method,
            prompts=len(self.prompts),
            steps=self.settings.steps,
            sha256=calibrated.files[AMAX].sha256,
        )
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
                name: FileEntry(**facts._asdict())
                for done in made
                for name, facts in done.files.items()
            },
            stages=tuple(self.stages),
            verification=verification,
            versions=versions(),
        )


def _report(tell: Tell, name: str, seconds: float, *, cached: bool = False) -> None:
    tell(f"{name:<10}{seconds:7.1f} s{'  (made before)' if cached else ''}")


def _note_own_size(options: ExportOptions, settings: Settings, tell: Tell) -> None:
    """Report that the model's own size is too large for the engine, where it is."""
    if _own_tokens(settings) > options.most_tokens:
        most = "x".join(map(str, options.max_size))
        own = f"{settings.width}x{settings.height}"
        tell(
            f"note: the engine takes images up to {most}, and the model's own size is {own}: "
            f"set a smaller size in each call, or --max-size {own} (engine.max_size)"
        )


def _own_tokens(settings: Settings) -> int:
    return (settings.width // 16) * (settings.height // 16)


def _family(pipe: Any, faults: Faults) -> Any:
    from hasten.families import family_of

    with faults.gather():
        return family_of(pipe)
    return None


def _settings(pipe: Any, sampling: Sampling) -> Settings:
    """What the pipeline is called with."""
    return Settings.of_model(_defaults(pipe)).under(sampling)


def _defaults(pipe: Any) -> ModelDefaults:
    """The model's own where it was loaded from a directory that has them, else the pipeline's."""
    name = getattr(pipe, "name_or_path", None)
    found = defaults_for(name) if name else ModelDefaults()
    side = pipe.default_sample_size * pipe.vae_scale_factor
    own: dict[str, Any] = {"width": side, "height": side}
    if not pipe.transformer.config.guidance_embeds:  # schnell: distilled to a few steps
        own["steps"] = FEW_STEPS
    left_open = own.keys() - found.model_fields_set
    return found.model_copy(update={name: own[name] for name in left_open})


def _name(pipe: Any) -> str:
    """What the pipeline was loaded as; of a directory, its last part: paths stay private."""
    return Path(getattr(pipe, "name_or_path", None) or type(pipe).__name__).name


def _load(calibrated: Done | None) -> Any:
    from hasten.engines.tensorrt.calibrate import load

    return None if calibrated is None else load(calibrated.folder / AMAX)


def _digests(done: Done | None) -> dict[str, str]:
    return {} if done is None else {name: facts.sha256 for name, facts in done.files.items()}
