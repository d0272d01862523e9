"""`OptimizedPipeline`: the callable that `optimize` returns, its summary and its restoration."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from hasten.errors import HastenError, UnsupportedError
from hasten.models.load import model_notes
from hasten.optimization import Optimization, optimization_of
from hasten.passes.cache.plan import why_none_skipped
from hasten.passes.compile import compiler_errors
from hasten.recipe import Recipe
from hasten.settings import Settings
from hasten.step.applied import replace_attribute
from hasten.step.chain import plain_module
from hasten.step.run import PipelineCall, RunCounts, current_call

EXCHANGED = "the transformer was replaced after optimising, and the new one is not optimised"


class OptimizedPipeline:
    """A pipeline under a recipe; other attributes are forwarded to the wrapped pipeline.

    `isinstance` also accepts it as the wrapped pipeline's class. Calls are serialised: calls from
    other threads, including those of pipelines made with `from_pipe`, wait until this one ends.

    Attributes:
        pipe: The wrapped Diffusers pipeline. It is optimised and can be called directly.
        last_run: Steps entered, computed and skipped by the last finished call.
    """

    _own = frozenset({"pipe", "last_run", "_optimization", "_defaults"})

    def __init__(self, pipe: Any, optimization: Optimization) -> None:
        self.pipe = pipe
        self.last_run = RunCounts()
        self._optimization = optimization
        self._defaults = Settings.for_call(pipe, optimization.recipe.sampling)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.pipe)

    @property
    def recipe(self) -> Recipe:
        """The recipe that was applied."""
        return self._optimization.recipe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline with its own arguments; return its own result.

        An omitted argument takes its value from the recipe's [sampling], then from the model's
        `hasten.json`, then from the pipeline's default.

        Raises:
            UnsupportedError: Compilation failed.
            CallError: The call was made from within another call that uses the same scheduler.
        """
        missing = self._missing(args, kwargs)
        call = PipelineCall(self.pipe.scheduler, outer=current_call())
        with self._optimization.lock, call.going_on(), compiler_errors():
            try:
                result = self.pipe(*args, **missing, **kwargs)
            finally:
                self._optimization.chain.end_run(call.scheduler)
        self.last_run = self._counts(call)
        return result

    def to(self, *args: Any, **kwargs: Any) -> OptimizedPipeline:
        """Move or cast the pipeline like Diffusers' `to`; return this object."""
        with self._optimization.lock:
            self.pipe.to(*args, **kwargs)
        return self

    def from_pipe(self, pipeline_class: Any, **kwargs: Any) -> OptimizedPipeline:
        """Make another pipeline of the family (img2img, inpainting …) from the same components.

        Args:
            pipeline_class: A Diffusers pipeline class.
            **kwargs: Arguments of Diffusers' `from_pipe`. The components keep their dtypes unless
                `dtype` is given. The scheduler is shared unless one is given.

        Returns:
            The new pipeline, optimised because it shares the transformer.
        """
        with self._optimization.lock, _dtypes_preserved(self.pipe, kwargs):
            other = pipeline_class.from_pipe(self.pipe, **kwargs)
        return OptimizedPipeline(other, self._optimization)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the plain pipeline like Diffusers, and copy the model's `hasten.json`.

        Raises:
            UnsupportedError: Weights are quantised or were freed. Nothing is written.
        """
        for done in self._optimization.applied:
            if done.cannot_undo:
                raise UnsupportedError(
                    f"the pipeline cannot be saved: {done.name}: {done.description}; the saved "
                    "file would be loaded as plain weights",
                    "save the pipeline before it is optimised; keep the recipe and optimise again "
                    "after loading",
                )
        self.pipe.save_pretrained(save_directory, *args, **kwargs)
        defaults = Path(self.pipe.config.get("_name_or_path") or "") / "hasten.json"
        if defaults.is_file():
            shutil.copyfile(defaults, Path(save_directory) / defaults.name)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that belong with every measurement of this pipeline, e.g. on random weights."""
        return (*self._notes(), *self._optimization.fallbacks())

    @property
    def calibrated(self) -> bool | None:
        """Whether the step cache's schedule was learned on these weights; None without a learned
        schedule."""
        return None if self._is_plain() else self._optimization.calibrated

    @property
    def held_bytes(self) -> int:
        """Bytes held for later steps of the current runs; 0 between calls."""
        return self._optimization.chain.held_bytes()

    def summary(self) -> str:
        """Describe each pass: its changes, its unchanged parts with reasons; and the last run."""
        recipe, applied = self.recipe, self._optimization.applied
        lines = [f"recipe {recipe.name}: {recipe.description}".rstrip(": ")]
        for done in applied:
            live = f" ({done.live()})" if done.live() else ""
            lines.append(f"  {done.name}: {done.description}{live}")
            if done.name == "cache" and self.calibrated is not None:
                learned = "learned on this model" if self.calibrated else "calibrated: false"
                lines.append(f"    schedule: {learned}")
            lines += [f"    unchanged: {part}: {reason}" for part, reason in done.unchanged]
        if not applied:
            lines.append("  nothing changed")
        if self.last_run.steps:
            run = self.last_run
            lines.append(f"  last run: {run.computed} of {run.steps} steps computed")
        lines += [f"  note: {note}" for note in self._notes()]
        return "\n".join(lines)

    def restore(self) -> Any:
        """Undo every pass, newest first, and return the plain pipeline.

        Raises:
            HastenError: A pass cannot be undone; it is named. All other passes are undone.
        """
        failures = self._optimization.restore()
        if failures:
            raise HastenError(
                failures,
                "load the pipeline again to get the original back; after copy=True, the pipeline "
                "that you passed in is unchanged",
            )
        return self.pipe

    def _missing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Defaults for the arguments that the caller omitted."""
        signature = inspect.signature(self.pipe.__call__)
        given = signature.bind_partial(*args, **kwargs).arguments
        missing = {
            name: value
            for name, value in self._defaults.items()
            if name in signature.parameters and name not in given
        }
        if given.get("sigmas") is not None or given.get("timesteps") is not None:
            missing.pop("num_inference_steps", None)
        return missing

    def _notes(self) -> tuple[str, ...]:
        exchanged = self._optimization.active and self._is_plain()
        notes = (*model_notes(self.pipe), *self._optimization.notes())
        steps = self.last_run.steps or self._defaults.get("num_inference_steps", 0)
        cache = self.recipe.cache if self._optimization.active else None
        unskipped = why_none_skipped(cache, steps) if steps else None
        return (*notes, *filter(None, (unskipped, EXCHANGED if exchanged else None)))

    def _is_plain(self) -> bool:
        """Whether this pipeline's transformer was replaced or is no longer optimised."""
        optimized = plain_module(self._optimization.chain.transformer)
        current = plain_module(self.pipe.transformer)
        return not self._optimization.active or current is not optimized

    def _counts(self, call: PipelineCall) -> RunCounts:
        counts = [run.counts() for run in call.runs]
        if counts and not self._is_plain():
            return RunCounts(
                steps=sum(one.steps for one in counts),
                computed=sum(one.computed for one in counts),
                skipped=sum(one.skipped for one in counts),
                stored=sum(one.stored for one in counts),
            )
        steps = int(getattr(self.pipe, "_num_timesteps", 0))
        return RunCounts(steps=steps, computed=steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedPipeline:
        """Copy the weights too; the copy is optimised in the same way, over its own weights."""
        duplicate = object.__new__(OptimizedPipeline)
        memo[id(self)] = duplicate
        with self._optimization.lock:
            object.__setattr__(duplicate, "pipe", copy.deepcopy(self.pipe, memo))
            object.__setattr__(duplicate, "_optimization", copy.deepcopy(self._optimization, memo))
        duplicate.last_run, duplicate._defaults = self.last_run, dict(self._defaults)
        duplicate._optimization.renew()
        return duplicate

    def __copy__(self) -> OptimizedPipeline:
        return OptimizedPipeline(copy.copy(self.pipe), self._optimization)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "an optimised pipeline cannot be pickled: compiled code, graphs and locks belong to "
            "this process",
            "load and optimise the pipeline in each process, or pickle what restore() returns",
        )

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


def restore(pipe: Any) -> Any:
    """Undo what `optimize` did to a pipeline, even if the object it returned is lost.

    Args:
        pipe: The result of `optimize`, its pipeline, or any pipeline over the same transformer.

    Returns:
        The plain pipeline.

    Raises:
        HastenError: A pass cannot be undone; it is named. All other passes are undone.
    """
    plain = pipe.pipe if type(pipe) is OptimizedPipeline else pipe
    optimization = optimization_of(plain)
    return plain if optimization is None else OptimizedPipeline(plain, optimization).restore()


@contextmanager
def _dtypes_preserved(pipe: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Prevent Diffusers' `from_pipe` from casting the shared components to one dtype."""
    if "dtype" in arguments or "torch_dtype" in arguments:
        yield
        return
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    put_back = [replace_attribute(module, "to", _stays(module)) for module in modules]
    try:
        yield
    finally:
        for undo in put_back:
            undo()


def _stays(module: nn.Module) -> Any:
    return lambda *_, **__: module
