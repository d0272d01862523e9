"""Every conflict of recipe × model × machine, found before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hasten.errors import AlreadyOptimizedError, UnsupportedError, join_fixes
from hasten.machine import Machine, Problem
from hasten.recipe import Recipe, ResidualCache

if TYPE_CHECKING:
    from hasten.models.family import Family

__all__ = ["Problem", "check", "learned_elsewhere", "problems", "refuse_optimized"]

MARK = "_hasten_recipe"  # set on an optimised transformer: the recipe's name


def problems(recipe: Recipe, machine: Machine, device_type: str) -> list[Problem]:
    """What of this recipe cannot run on a device of this type here. Needs no model."""
    found = []
    if recipe.compile is not None and (trouble := machine.compile_problem(device_type)):
        fault, fix = trouble
        rest = "the preset 'cache'" if recipe.cache else "the preset 'baseline'"
        found.append(Problem(fault, f"{fix}; or use {rest}, which needs no compiler"))
    if isinstance(recipe.cache, ResidualCache) and recipe.compile and recipe.compile.mode == "full":
        found.append(
            Problem(
                'cache.kind = "residual" decides between the blocks, and compile.mode = "full" '
                "makes one graph of all of them",
                'set compile.mode = "blocks", or use a planned cache, such as kind = "interval"',
            )
        )
    if recipe.offload is not None and recipe.offload.kind == "model" and device_type == "cpu":
        found.append(
            Problem(
                'offload.kind = "model" needs an accelerator to offload from, and this is the CPU',
                "leave [offload] out: on a CPU the weights are in host memory already",
            )
        )
    return found


def check(
    recipe: Recipe, pipe: Any, family: Family, machine: Machine, fingerprint: str | None
) -> None:
    """Raise UnsupportedError with every conflict at once; return if there is none.

    `fingerprint` is the model's; None accepts a schedule of any model.
    """
    found = [
        *problems(recipe, machine, pipe.device.type),
        *_model_problems(recipe, pipe, family),
        *_residual_problems(recipe, pipe.transformer, family),
        *_schedule_problems(recipe, fingerprint),
    ]
    if found:
        faults, fixes = zip(*found, strict=True)
        raise UnsupportedError(faults, join_fixes(fixes))


def learned_elsewhere(recipe: Recipe, fingerprint: str | None) -> str | None:
    """Fingerprint of the other model that the recipe's schedule was learned on; None if of none."""
    learned_on: str | None = getattr(recipe.cache, "fingerprint", None)
    return None if fingerprint is None or learned_on == fingerprint else learned_on


def refuse_optimized(pipe: Any) -> None:
    """Raise if this pipeline, or another that shares its transformer, is optimised already."""
    name = getattr(getattr(pipe, "transformer", None), MARK, None)
    if name is not None:
        raise AlreadyOptimizedError(
            f"the pipeline's transformer is already optimised with the recipe {name!r}",
            "call restore() on what optimize() returned, or pass the plain pipeline with copy=True",
        )


def _model_problems(recipe: Recipe, pipe: Any, family: Family) -> list[Problem]:
    found = []
    if recipe.compile is not None:
        blocks = family.repeated_blocks(pipe.transformer)
        compiled = [name for name, block in blocks if block._compiled_call_impl is not None]
        if compiled or pipe.transformer._compiled_call_impl is not None:
            found.append(
                Problem(
                    f"the transformer is compiled already ({len(compiled)} of its blocks)",
                    "leave the compiling to the recipe, or take [compile] out of it",
                )
            )
    if recipe.cache is not None and not hasattr(pipe.scheduler, "step_index"):
        found.append(
            Problem(
                f"{type(pipe.scheduler).__name__} does not say at which step it is",
                "step caching needs a scheduler with step_index, as all flow-matching ones have",
            )
        )
    if recipe.cache is not None and getattr(pipe.transformer, "is_cache_enabled", False):
        found.append(
            Problem(
                "one of Diffusers' own caches is enabled on the transformer",
                "call pipe.transformer.disable_cache() first",
            )
        )
    return found


def _residual_problems(recipe: Recipe, transformer: Any, family: Family) -> list[Problem]:
    """Why the transformer cannot be run block by block, some blocks always and the others not."""
    if not isinstance(recipe.cache, ResidualCache):
        return []
    found = []
    blocks = len(family.repeated_blocks(transformer))
    if recipe.cache.first_blocks >= blocks:
        found.append(
            Problem(
                f"cache.first_blocks = {recipe.cache.first_blocks} leaves none of the "
                f"transformer's {blocks} blocks to skip",
                "one first block is the usual number",
            )
        )
    own = type(transformer).forward
    if getattr(transformer.forward, "__func__", None) is not own or (
        transformer._compiled_call_impl is not None
    ):
        found.append(
            Problem(
                "the transformer's forward was replaced or compiled (by offloading, hooks or "
                'torch.compile), and cache.kind = "residual" runs its blocks one by one instead',
                "optimise the plain pipeline and put such things into the recipe, or around it "
                'afterwards; or use a planned cache, such as kind = "interval"',
            )
        )
    return found


def _schedule_problems(recipe: Recipe, fingerprint: str | None) -> list[Problem]:
    learned_on = learned_elsewhere(recipe, fingerprint)
    if learned_on is None:
        return []
    return [
        Problem(
            f"the schedule was learned on another model ({learned_on}; this one is {fingerprint})",
            "learn one for this model with `hasten calibrate`, or insist with --force (force=True)",
        )
    ]
