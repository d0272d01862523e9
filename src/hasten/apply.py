"""The whole engine: check, then the passes in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.check import check, refuse_optimized
from hasten.conflicts import graphs_declined, kernels_declined
from hasten.families.family import Family, family_of
from hasten.log import logger
from hasten.machine import machine
from hasten.models.fingerprint import fingerprint
from hasten.passes.applied import Applied
from hasten.passes.attention import Attend, choose_attention
from hasten.passes.cache.planner import Planner
from hasten.passes.cache.policy_planned import Planned
from hasten.passes.cache.residual import Residual
from hasten.passes.cache.step import Policy, StepCache, cache_steps
from hasten.passes.compile import compile_blocks, compile_forward
from hasten.passes.decoder import improve_decoder
from hasten.passes.fuse.forward import FusedForward
from hasten.passes.fuse.fuse import fuse_forward
from hasten.passes.fuse.on_engine import run_on_engine
from hasten.passes.graphs import graph_body, graph_forward, no_graphs
from hasten.passes.offload import offload_models, offload_modulations
from hasten.passes.quantize import quantize_linears
from hasten.passes.text.prepare import prepare_text
from hasten.pipeline import OptimizedPipeline, undo_all
from hasten.recipe import Cache, Decoder, Engine, Recipe, ResidualCache, Sampling, Text, resolve
from hasten.structural_copy import structural_copy

__all__ = ["optimize"]


def optimize(
    pipe: Any, recipe: str | Path | Recipe, *, copy: bool = False, force: bool = False
) -> OptimizedPipeline:
    """Apply a recipe to a Diffusers pipeline and return it as a callable of the same signature.

    recipe: a preset's name, the path of a .toml file or a Recipe. The pipeline is taken over in
    place; `copy=True` leaves it untouched and works on a structural copy that shares the weights.
    `force=True` accepts a schedule or static scales that were learned on another model.

    Raises RecipeError or InputError (the recipe), UnsupportedError (this model or machine cannot
    do it), AlreadyOptimizedError. Whatever is raised, the pipeline is as it was, or the
    error carries a note of what is not.
    """
    recipe = resolve(recipe)
    if isinstance(pipe, OptimizedPipeline):
        pipe = pipe.pipe
    family = family_of(pipe)
    refuse_optimized(pipe)
    learned = recipe.cache or (recipe.quantize and recipe.quantize.fingerprint)
    name = fingerprint(pipe.transformer) if learned else None
    check(recipe, pipe, family, machine(), None if force else name)
    if copy:
        pipe = structural_copy(pipe)

    applied: list[Applied] = []
    try:
        cache = _apply(pipe, recipe, family, name, applied)
    except BaseException as error:
        for stuck in undo_all(applied):
            error.add_note(stuck)
        raise
    return OptimizedPipeline(pipe, recipe, applied, cache)


def _apply(
    pipe: Any, recipe: Recipe, family: Family, name: str | None, applied: list[Applied]
) -> StepCache | None:
    """The passes in order; each adds to `applied` as soon as it has changed something."""
    transformer = pipe.transformer
    if recipe.quantize:
        applied.append(quantize_linears(transformer, family, recipe.quantize, name))
    if recipe.engine:
        applied.append(_run_on_engine(pipe, family, recipe.engine, recipe.sampling))
    else:
        _speed_up_a_step(pipe, recipe, family, applied)
    cache: StepCache | None = None
    if recipe.cache:  # around all that, so that the decision stays outside compiled code and graphs
        done, cache = cache_steps(pipe, _policy(recipe.cache, transformer, family, name))
        applied.append(done)
    applied.extend(improve_decoder(pipe.vae, recipe.decoder or Decoder()))
    applied.extend(prepare_text(pipe, recipe.text or Text()))
    if recipe.offload and recipe.offload.kind == "modulation":
        applied.append(offload_modulations(family.modulated_norms(transformer), pipe.device))
    if recipe.offload and recipe.offload.kind == "model":  # last: its hooks wrap the forward
        applied.append(offload_models(pipe))
    return cache


def _run_on_engine(pipe: Any, family: Family, recipe: Engine, sampling: Sampling | None) -> Applied:
    """The blocks as an engine, exported first where it is not yet there; the log says how far."""
    from hasten.engines.load import load_body

    body = load_body(pipe, recipe, sampling, tell=logger.info, show=logger.debug)
    what = f"the blocks in {recipe.precision} by {body.driver.what}"
    close = body.driver.close
    return run_on_engine(pipe, family, body, what, close=close, release=recipe.release)


def _speed_up_a_step(pipe: Any, recipe: Recipe, family: Family, applied: list[Applied]) -> None:
    """Attention, fusion, compilation and graphs: what happens within one computed step."""
    transformer, attend, fused = pipe.transformer, Attend("native"), None
    mode = recipe.compile.mode if recipe.compile else "none"
    if recipe.attention:
        done, attend = choose_attention(transformer, recipe.attention)
        applied.append(done)
    if recipe.fuse:
        done, fused = fuse_forward(pipe, family, recipe.fuse, attend, kernels_declined(recipe))
        applied.append(done)
    if recipe.compile and mode == "blocks":
        applied.append(compile_blocks(family.repeated_blocks(transformer), recipe.compile))
    elif recipe.compile and mode == "full":
        applied.append(compile_forward(transformer, recipe.compile))
    if recipe.compile and recipe.compile.cuda_graphs != "off":
        applied.append(_graph(pipe, recipe, family, fused))


def _graph(pipe: Any, recipe: Recipe, family: Family, fused: FusedForward | None) -> Applied:
    """CUDA graphs of a computed step; `check` has seen to it that "on" can be done."""
    if why := graphs_declined(recipe, pipe.device.type):
        return no_graphs(why)
    insist = recipe.compile is not None and recipe.compile.cuda_graphs == "on"
    if fused is not None:
        return graph_body(fused, insist=insist)
    return graph_forward(pipe.transformer, family, insist=insist)


def _policy(cache: Cache, transformer: Any, family: Family, name: str | None) -> Policy:
    """What the `[cache]` section asks for, on the transformer as it is now, maybe compiled."""
    if isinstance(cache, ResidualCache):
        return Residual(cache, transformer, family)
    return Planned(transformer.forward, Planner(cache, name))
