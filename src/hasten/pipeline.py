"""What `optimize` returns: the pipeline, called exactly as before, and what was done to it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.check import MARK, learned_elsewhere
from hasten.errors import HastenError
from hasten.models.defaults import defaults_for
from hasten.models.load import model_notes
from hasten.passes.applied import Applied
from hasten.passes.cache.state import RunCounts
from hasten.passes.cache.step import StepCache
from hasten.passes.compile import compiler_errors
from hasten.recipe import Recipe, parse_size
from hasten.step.scheduler import driven_by

__all__ = ["OptimizedPipeline", "undo_all"]

FORCED = "schedule learned on another model, used by force"


class OptimizedPipeline:
    """A pipeline under a recipe. Attributes it does not have itself are the pipeline's.

    pipe: the Diffusers pipeline underneath, itself a working optimised pipeline; recipe: what was
    asked for; last_run: steps entered, computed and skipped by the last finished call.
    """

    _own = frozenset({"pipe", "recipe", "last_run", "_applied", "_cache", "_defaults"})

    def __init__(
        self, pipe: Any, recipe: Recipe, applied: list[Applied], cache: StepCache | None
    ) -> None:
        self.pipe = pipe
        self.recipe = recipe
        self.last_run = RunCounts()
        self._applied = applied
        self._cache = cache
        self._defaults = _call_defaults(pipe, recipe)
        setattr(pipe.transformer, MARK, recipe.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline: same arguments, same result.

        What the caller leaves out comes from the recipe's [sampling], then from the model's
        `hasten.json`, then from the pipeline itself. UnsupportedError where the compiler fails.
        """
        signature = inspect.signature(self.pipe.__call__)
        given = signature.bind_partial(*args, **kwargs).arguments
        missing = {
            name: value
            for name, value in self._defaults.items()
            if name in signature.parameters and name not in given
        }
        if given.get("sigmas") is not None or given.get("timesteps") is not None:
            missing.pop("num_inference_steps", None)
        scheduler = self.pipe.scheduler
        try:
            with driven_by(scheduler), compiler_errors():
                result = self.pipe(*args, **missing, **kwargs)
        finally:
            if self._cache is not None:
                with driven_by(scheduler):
                    self._cache.drop()
        self.last_run = self._counts()
        return result

    def from_pipe(self, pipeline_class: Any, **kwargs: Any) -> OptimizedPipeline:
        """Another pipeline of the family (img2img, inpainting …) over the same components.

        It shares the transformer and so the optimisation; the state of a call is its own.
        """
        kwargs.setdefault("dtype", self.pipe.dtype)
        other = pipeline_class.from_pipe(self.pipe, **kwargs)
        return OptimizedPipeline(other, self.recipe, self._applied, self._cache)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of this pipeline's figures must know, e.g. that its weights are random."""
        declined = [
            f"{applied.name}: {what} left alone: {why}"
            for applied in self._applied
            if applied.declined
            for what, why in applied.left_alone
        ]
        return (*self._model_notes(), *declined)

    @property
    def call_defaults(self) -> dict[str, Any]:
        """Call arguments used where the caller passes none: the model's, then the recipe's."""
        return dict(self._defaults)

    @property
    def calibrated(self) -> bool | None:
        """Whether the step cache runs a schedule learned on a model; None where it runs none."""
        return None if self._cache is None else getattr(self._cache.planner, "calibrated", None)

    def summary(self) -> str:
        """Every pass, what it touched, what was left alone and why; the last run's steps."""
        lines = [f"recipe {self.recipe.name}: {self.recipe.description}".rstrip(": ")]
        for applied in self._applied:
            live = f" ({applied.live()})" if applied.live() else ""
            lines.append(f"  {applied.name}: {applied.what}{live}")
            lines += [f"    left alone: {what}: {why}" for what, why in applied.left_alone]
        if not self._applied:
            lines.append("  nothing changed")
        if self.last_run.steps:
            run = self.last_run
            lines.append(f"  last run: {run.computed} of {run.steps} steps computed")
        lines += [f"  note: {note}" for note in self._model_notes()]
        return "\n".join(lines)

    def restore(self) -> Any:
        """Undo every pass, newest first, and return the plain pipeline.

        Raises HastenError naming what cannot be undone; everything else is undone all the same.
        """
        stuck = undo_all(self._applied)
        self._applied[:] = [replace(done, undo=None) for done in self._applied if done.cannot_undo]
        self._cache = None
        if hasattr(self.pipe.transformer, MARK):
            delattr(self.pipe.transformer, MARK)
        if stuck:
            raise HastenError(
                stuck,
                "load the pipeline again to have it as it was; after copy=True the one that you "
                "passed in is still whole",
            )
        return self.pipe

    def _model_notes(self) -> tuple[str, ...]:
        planner = getattr(self._cache, "planner", None)
        forced = learned_elsewhere(self.recipe, getattr(planner, "fingerprint", None))
        of_passes = [note for applied in self._applied for note in applied.notes]
        return (*model_notes(self.pipe), *([FORCED] if forced else []), *of_passes)

    def _counts(self) -> RunCounts:
        if self._cache is not None:
            return self._cache.last_run
        steps = int(getattr(self.pipe, "_num_timesteps", 0))
        return RunCounts(steps=steps, computed=steps)

    def __getattr__(self, name: str) -> Any:
        if name in OptimizedPipeline._own:
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OptimizedPipeline._own:
            object.__setattr__(self, name, value)
        else:
            setattr(self.pipe, name, value)

    def __repr__(self) -> str:
        return f"OptimizedPipeline({type(self.pipe).__name__}, recipe={self.recipe.name!r})"


def undo_all(applied: list[Applied]) -> list[str]:
    """Undo passes, newest first; return a line for each that cannot be undone."""
    stuck = []
    for done in reversed(applied):
        if done.undo is not None:
            done.undo()
        if done.cannot_undo:
            stuck.append(f"{done.name} cannot be undone: {done.cannot_undo}")
    return stuck


def _call_defaults(pipe: Any, recipe: Recipe) -> dict[str, Any]:
    """Call arguments to use where the caller passes none: the model's, then the recipe's."""
    defaults: dict[str, Any] = {}
    source = pipe.config.get("_name_or_path")
    if source and (Path(source) / "hasten.json").is_file():
        model = defaults_for(str(Path(source).absolute()))
        defaults = {
            "num_inference_steps": model.steps,
            "guidance_scale": model.guidance,
            "width": model.width,
            "height": model.height,
            "max_sequence_length": model.max_sequence_length,
        }
    sampling = recipe.sampling
    if sampling is None:
        return defaults
    asked = {
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "max_sequence_length": sampling.max_sequence_length,
    }
    if sampling.size is not None:
        asked["width"], asked["height"] = parse_size(sampling.size)
    return {**defaults, **{name: value for name, value in asked.items() if value is not None}}
