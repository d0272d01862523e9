"""`hasten.optimize`: checks the recipe, then applies the passes in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hasten.check import check, refuse_optimized
from hasten.errors import AlreadyOptimizedError
from hasten.families import family_of
from hasten.machine import machine
from hasten.optimization import Optimization, optimization_of
from hasten.passes.attention import Attend, choose_attention
from hasten.passes.cache.layer import Policy, cache_steps
from hasten.passes.cache.plan import Planner
from hasten.passes.cache.policy_planned import PlannedPolicy
from hasten.passes.cache.residual import ResidualPolicy
from hasten.passes.compile import compile_blocks, compile_forward
from hasten.passes.decoder import improve_decoder
from hasten.passes.engine import run_on_engine
from hasten.passes.fuse import fuse_step
from hasten.passes.offload import offload_models, offload_modulations
from hasten.passes.quantize import quantize_linears
from hasten.passes.text.embeddings import cache_embeddings
from hasten.passes.text.weights import store_in_eight_bits
from hasten.pipeline import OptimizedPipeline
from hasten.recipe import Cache, Decoder, Recipe, ResidualCache, Text, resolve
from hasten.step.applied import Applied
from hasten.step.block_hooks import BlockHooks
from hasten.step.chain import StepChain
from hasten.step.graphs import no_graphs, record_graphs
from hasten.step.run import SchedulerOf
from hasten.structural_copy import structural_copy


def optimize(
    pipe: Any, recipe: str | Path | Recipe, *, copy: bool = False, force: bool = False
) -> OptimizedPipeline:
    """Apply a recipe to a Diffusers pipeline.

    If an error is raised, the pipeline is restored first. A note on the error lists changes that
    could not be undone.

    Args:
        pipe: A Diffusers pipeline, or the result of an earlier call. It is changed in place.
        recipe: A preset name, the path of a .toml file, or a Recipe.
        copy: Leave the pipeline unchanged and optimise a structural copy that shares its weights.
        force: Accept a schedule or static scales that were learned on another model.

    Returns:
        The optimised pipeline, called with the same arguments as the original one.

    Raises:
        RecipeError: The recipe is not valid.
        InputError: The recipe file cannot be read.
        UnsupportedError: This model or machine does not support the recipe.
        AlreadyOptimizedError: The pipeline is already optimised and `copy` is false.
    """
    recipe = resolve(recipe)
    if type(pipe) is OptimizedPipeline:
        pipe = pipe.pipe
    family = family_of(pipe)
    if before := optimization_of(pipe):
        if not copy:
            refuse_optimized(pipe)
        with _suspended(before, pipe):
            return optimize(pipe, recipe, copy=True, force=force)
    verdict = check(recipe, pipe, family, machine(), force=force)
    if copy:
        pipe = structural_copy(pipe)
    chain = StepChain(pipe.transformer, SchedulerOf(pipe))
    optimization = Optimization(recipe, family, verdict, chain)
    optimization.apply(partial(_apply, pipe, optimization))
    return OptimizedPipeline(pipe, optimization)


@contextmanager
def _suspended(optimization: Optimization, pipe: Any) -> Iterator[None]:
    """Restore the plain pipeline inside the context; apply the passes again afterwards."""
    permanent = [done.cannot_undo for done in optimization.applied if done.cannot_undo]
    if permanent:
        raise AlreadyOptimizedError(
            f"the pipeline is already optimised and cannot be copied as plain: {permanent[0]}",
            "load the pipeline again",
        )
    with optimization.lock:
        optimization.restore()
        try:
            yield
        finally:
            optimization.apply(partial(_apply, pipe, optimization))


def _apply(pipe: Any, optimization: Optimization, applied: list[Applied]) -> None:
    """Run the passes in order; append each to `applied` as soon as it has changed something."""
    recipe, verdict, family = optimization.recipe, optimization.verdict, optimization.family
    chain, transformer = optimization.chain, pipe.transformer
    if recipe.quantize and verdict.linears:
        applied.append(quantize_linears(transformer, verdict.linears, recipe.quantize))
    if recipe.engine:
        applied.append(_run_on_engine(pipe, optimization))
    else:
        _speed_up_a_step(optimization, pipe, applied)
    if recipe.cache:  # outermost: the decision stays outside compiled code and graphs
        applied.append(cache_steps(chain, _policy(recipe.cache, optimization)))
    applied.extend(improve_decoder(getattr(pipe, "vae", None), recipe.decoder or Decoder()))
    text = recipe.text or Text()
    if text.scheme is not None:  # before the cache, which would keep embeddings of the old weights
        applied.append(store_in_eight_bits(pipe.text_encoder_2, text.scheme))
    if text.cache_mb:
        applied.append(cache_embeddings(pipe, text.cache_mb))
    if recipe.offload and recipe.offload.kind == "modulation":
        applied.append(offload_modulations(family.modulated_norms(transformer), pipe.device))
    if recipe.offload and recipe.offload.kind == "model":  # last: its hooks wrap the forward
        applied.append(offload_models(pipe))


def _run_on_engine(pipe: Any, optimization: Optimization) -> Applied:
    """Run the blocks on an engine; a missing export is made first, and its progress is logged."""
    from hasten.engines.load import load_body

    recipe = optimization.recipe.engine
    assert recipe is not None
    sampling = optimization.recipe.sampling
    body = load_body(pipe, recipe, sampling)
    description = f"the blocks in {recipe.precision} by {body.driver.description}"
    return run_on_engine(
        optimization.chain,
        optimization.family,
        body,
        description,
        close=body.driver.close,
        release=recipe.release,
    )


def _speed_up_a_step(optimization: Optimization, pipe: Any, applied: list[Applied]) -> None:
    """Apply the passes within a computed step: attention, fusion, compilation and CUDA graphs."""
    recipe, verdict, family = optimization.recipe, optimization.verdict, optimization.family
    chain, attend = optimization.chain, Attend("native")
    mode = recipe.compile.mode if recipe.compile else "none"
    if recipe.attention:
        done, attend = choose_attention(chain, recipe.attention, family.tokens)
        applied.append(done)
    if recipe.fuse:
        applied.append(fuse_step(chain, family, recipe.fuse, attend, verdict.kernels))
    if recipe.compile and mode == "blocks":
        blocks = family.repeated_blocks(pipe.transformer)
        applied.append(compile_blocks(blocks, recipe.compile))
    elif recipe.compile and mode == "full":
        applied.append(compile_forward(chain, recipe.compile))
    if recipe.compile and recipe.compile.cuda_graphs != "off":
        if verdict.graphs:
            applied.append(no_graphs(verdict.graphs))
        else:
            required = recipe.compile.cuda_graphs == "on"
            applied.append(record_graphs(chain, required=required))


def _policy(cache: Cache, optimization: Optimization) -> Policy:
    """The step cache policy for a `[cache]` section."""
    if not isinstance(cache, ResidualCache):
        return PlannedPolicy(Planner(cache, optimization.verdict.fingerprint))
    family, transformer = optimization.family, optimization.chain.transformer
    hooks = BlockHooks([(block, stack.returns) for _, block, stack in family.blocks(transformer)])
    return ResidualPolicy(cache, hooks, family.output)
