"""The whole engine: check, then the passes in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.check import check, refuse_optimized
from hasten.copying import structural_copy
from hasten.machine import machine
from hasten.models.family import Family, family_of
from hasten.models.fingerprint import fingerprint
from hasten.passes.applied import Applied
from hasten.passes.cache.planned import Planned
from hasten.passes.cache.planner import Planner
from hasten.passes.cache.residual import Residual
from hasten.passes.cache.step import Policy, StepCache, cache_steps
from hasten.passes.compile import compile_blocks, compile_forward
from hasten.passes.offload import offload_models
from hasten.pipeline import OptimizedPipeline, undo_all
from hasten.recipe import Cache, Recipe, ResidualCache, resolve

__all__ = ["optimize"]


def optimize(
    pipe: Any, recipe: str | Path | Recipe, *, copy: bool = False, force: bool = False
) -> OptimizedPipeline:
    """Apply a recipe to a Diffusers pipeline and return it as a callable of the same signature.

    recipe: a preset's name, the path of a .toml file or a Recipe. The pipeline is taken over in
    place; `copy=True` leaves it untouched and works on a structural copy that shares the weights.
    `force=True` accepts a schedule that was learned on another model.

    Raises RecipeError or InputError (the recipe), UnsupportedError (this model or machine cannot
    do it), AlreadyOptimizedError. Whatever is raised, the pipeline is as it was.
    """
    recipe = resolve(recipe)
    if isinstance(pipe, OptimizedPipeline):
        pipe = pipe.pipe
    family = family_of(pipe)
    refuse_optimized(pipe)
    name = fingerprint(pipe.transformer) if recipe.cache else None
    check(recipe, pipe, family, machine(), None if force else name)
    if copy:
        pipe = structural_copy(pipe)

    applied: list[Applied] = []
    cache: StepCache | None = None
    try:
        if recipe.compile and recipe.compile.mode == "blocks":
            applied.append(compile_blocks(family.repeated_blocks(pipe.transformer), recipe.compile))
        elif recipe.compile:
            applied.append(compile_forward(pipe.transformer, recipe.compile))
        if recipe.cache:  # around the compiled code, so that the decision stays outside it
            done, cache = cache_steps(pipe, _policy(recipe.cache, pipe.transformer, family, name))
            applied.append(done)
        if recipe.offload and recipe.offload.kind == "model":  # last: its hooks wrap the forward
            applied.append(offload_models(pipe))
    except BaseException:
        undo_all(applied)
        raise
    return OptimizedPipeline(pipe, recipe, applied, cache)


def _policy(cache: Cache, transformer: Any, family: Family, name: str | None) -> Policy:
    """What the `[cache]` section asks for, on the transformer as it is now, maybe compiled."""
    if isinstance(cache, ResidualCache):
        return Residual(cache, transformer, family)
    return Planned(transformer.forward, Planner(cache, name))
