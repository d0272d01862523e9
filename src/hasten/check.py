"""Checks a recipe against the model and the machine before anything is changed.

The result is a `Verdict` that the passes follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.conflicts import conflicts, why_no_graphs, why_no_kernels
from hasten.errors import AlreadyOptimizedError, Problem, unsupported
from hasten.machine import Machine
from hasten.recipe import BudgetCache, Quantize, Recipe, ResidualCache, ScheduleCache

if TYPE_CHECKING:
    from hasten.families.family import Family
    from hasten.quantization.plan import LinearPlan


MARK = "_hasten_optimization"  # attribute of an optimised transformer: its `Optimization`

FORCED_SCHEDULE = "schedule learned on another model, used by force"
FORCED_SCALES = "static scales calibrated on another model, used by force"


@dataclass(frozen=True)
class Verdict:
    """The decisions that the passes follow.

    Attributes:
        fingerprint: Fingerprint of the transformer's weights if the recipe needs one and they are
            readable.
        linears: The linears to quantise; None without `[quantize]`.
        kernels: Why the blocks do not run on fused kernels; None if they do.
        graphs: Why no CUDA graphs are recorded; None if they are.
        notes: Notes that belong with every result.
    """

    fingerprint: str | None = None
    linears: LinearPlan | None = None
    kernels: str | None = None
    graphs: str | None = None
    notes: tuple[str, ...] = ()


def problems(recipe: Recipe, machine: Machine, device_type: str) -> list[Problem]:
    """Everything in a recipe that this machine cannot run on such a device. Needs no model.

    Args:
        recipe: The recipe.
        machine: The machine.
        device_type: "cpu", "cuda" or "mps".
    """
    return [
        *_machine_problems(recipe, machine, device_type),
        *conflicts(recipe, device_type),
    ]


def check(
    recipe: Recipe, pipe: Any, family: Family, machine: Machine, *, force: bool = False
) -> Verdict:
    """Decide what the passes do.

    Args:
        recipe: The recipe.
        pipe: The plain pipeline.
        family: The family of its transformer.
        machine: The machine that it runs on.
        force: Accept a schedule and static scales that were learned on another model.

    Raises:
        UnsupportedError: The recipe cannot be applied. All problems are listed at once.
    """
    transformer = pipe.transformer
    name, unknown = _fingerprint(recipe, transformer)
    faults = [
        *problems(recipe, machine, pipe.device.type),
        *_model_problems(recipe, pipe, family),
        *_family_problems(recipe, transformer, family),
        *_weight_problems(recipe, transformer),
        *_linear_problems(recipe, transformer, family),
        *_forward_problems(recipe, transformer),
        *_offload_problems(recipe, transformer, family),
        *_residual_problems(recipe, transformer, family),
        *_text_encoder_problems(recipe, pipe),
        *_vae_problems(recipe, getattr(pipe, "vae", None)),
        *([] if force else _learned_problems(recipe, name, unknown)),
    ]
    if faults:
        raise unsupported(faults)
    kernels = _against_kernels(recipe, transformer, family)
    if kernels and recipe.fuse is not None and recipe.fuse.kernels == "on":
        fix = 'set fuse.kernels = "auto", or "off"'
        raise unsupported([Problem(f'fuse.kernels = "on": {kernels}', fix)])
    return Verdict(
        fingerprint=name,
        linears=_plan(recipe, transformer, family),
        kernels=kernels,
        graphs=why_no_graphs(recipe, pipe.device.type),
        notes=_notes(recipe, family, name, unknown),
    )


def refuse_optimized(pipe: Any) -> None:
    """Raise AlreadyOptimizedError if the pipeline's transformer is optimised."""
    if optimization := getattr(getattr(pipe, "transformer", None), MARK, None):
        raise AlreadyOptimizedError(
            "the pipeline's transformer is already optimised with the recipe "
            f"{optimization.recipe.name!r}",
            "call hasten.restore(pipe) first, or pass copy=True",
        )


def empty_weights(transformer: Any) -> Problem | None:
    """The problem of weights that an engine has freed; None if all are present."""
    empty = [name for name, weight in transformer.named_parameters() if not weight.numel()]
    if not empty:
        return None
    return Problem(
        f"{len(empty)} parameters of the transformer are empty ({empty[0]}, …): "
        "engine.release = true freed them",
        "load the pipeline again",
    )


def _model_problems(recipe: Recipe, pipe: Any, family: Family) -> Iterator[Problem]:
    if problem := empty_weights(pipe.transformer):
        yield problem
    if recipe.compile is not None:
        blocks = family.repeated_blocks(pipe.transformer)
        compiled = [name for name, block in blocks if block._compiled_call_impl is not None]
        if compiled or pipe.transformer._compiled_call_impl is not None:
            yield Problem(
                f"the transformer is already compiled ({len(compiled)} of its blocks)",
                "pass an uncompiled pipeline, or remove [compile] from the recipe",
            )
    if recipe.cache is not None and not (
        hasattr(pipe.scheduler, "step_index") and hasattr(pipe.scheduler, "sigmas")
    ):
        yield Problem(
            f"{type(pipe.scheduler).__name__} has no step_index or no sigmas",
            "step caching needs a flow-matching scheduler that has both, such as "
            "FlowMatchEulerDiscreteScheduler",
        )
    if recipe.cache is not None and getattr(pipe.transformer, "is_cache_enabled", False):
        yield Problem(
            "one of Diffusers' own caches is enabled on the transformer",
            "call pipe.transformer.disable_cache() first",
        )


def _machine_problems(recipe: Recipe, machine: Machine, device_type: str) -> Iterator[Problem]:
    """Requirements of the recipe that this machine does not meet."""
    quantize, engine, decoder = recipe.quantize, recipe.engine, recipe.decoder
    if quantize is not None:
        problem = machine.quantize_problem(
            device_type, quantize.scheme, emulate=quantize.emulate, compiled=recipe.compiles
        )
        if problem:
            yield problem
    if engine is not None:
        yield from machine.engine_problems(
            device_type, engine.kind, engine.precision, exported=engine.path is not None
        )
    if recipe.text is not None and recipe.text.scheme == "fp8-weight" and device_type == "mps":
        yield Problem(
            'text.scheme = "fp8-weight": mps does not support FP8', 'set scheme = "int8-weight"'
        )
    if recipe.compiles or (decoder is not None and decoder.compile):
        instead = "leave decoder.compile out"
        if recipe.compiles:
            plain = "cache" if recipe.cache else "baseline"
            instead = f"use the preset {plain!r}, which needs no compiler"
        if problem := machine.compile_problem(device_type):
            yield Problem(problem.fault, f"{problem.fix}; or {instead}")


def _linear_problems(recipe: Recipe, transformer: Any, family: Family) -> Iterator[Problem]:
    """Why the transformer's linears cannot be quantised under `[quantize]`."""
    if recipe.quantize is not None:
        from hasten.quantization.plan import plan_problems

        linears = family.quantizable(transformer)
        yield from plan_problems(transformer, linears, recipe.quantize)


def _plan(recipe: Recipe, transformer: Any, family: Family) -> LinearPlan | None:
    if recipe.quantize is None:
        return None
    from hasten.quantization.plan import plan_linears

    return plan_linears(transformer, family.quantizable(transformer), recipe.quantize)


def _against_kernels(recipe: Recipe, transformer: Any, family: Family) -> str | None:
    """Why the blocks will not run on fused kernels once they are quantised; None if they will."""
    if recipe.fuse is None or recipe.fuse.kernels == "off":
        return 'kernels = "off"'
    if why := why_no_kernels(recipe):
        return why
    if family.kernels is None:
        return f"there are no fused kernels for {family.name}: only FLUX.1 has them"
    reasons = family.kernels.reasons_against(transformer, _planned(recipe, transformer, family))
    return reasons[0] if reasons else None


def _planned(recipe: Recipe, transformer: Any, family: Family) -> Mapping[Any, type]:
    """The classes that will replace linears under `[quantize]`, by linear."""
    plan = _plan(recipe, transformer, family)
    if plan is None or recipe.quantize is None:
        return {}
    from hasten.quantization.linear import linear_class

    kind, names = linear_class(recipe.quantize), set(plan.names)
    return {linear: kind for name, linear in family.quantizable(transformer) if name in names}


def _fingerprint(recipe: Recipe, transformer: Any) -> tuple[str | None, str]:
    """The fingerprint of the weights if the recipe needs one, else None; and why it is unreadable,
    if it is."""
    cache = recipe.cache
    learned = isinstance(cache, BudgetCache | ScheduleCache)
    if not learned and (recipe.quantize is None or recipe.quantize.fingerprint is None):
        return None, ""
    from hasten.models.fingerprint import fingerprint, unreadable

    why = unreadable(transformer)
    return (None, why) if why else (fingerprint(transformer), "")


def _learned_problems(recipe: Recipe, name: str | None, unknown: str) -> Iterator[Problem]:
    """A schedule or static scales that were learned on another, or an unidentified, model."""
    this_model = f"this one is {name}" if name else f"this one is not identified: {unknown}"
    schedule: str | None = getattr(recipe.cache, "fingerprint", None)
    if schedule not in (None, name):
        yield Problem(
            f"the schedule was learned on another model ({schedule}; {this_model})",
            "learn one for this model with `hasten calibrate`, or use --force (force=True)",
        )
    scales = recipe.quantize.fingerprint if recipe.quantize else None
    if scales not in (None, name):
        yield Problem(
            f"the static scales were calibrated on another model ({scales}; {this_model})",
            "calibrate this one with `hasten calibrate-scales`, or use --force (force=True)",
        )


def _notes(recipe: Recipe, family: Family, name: str | None, unknown: str) -> tuple[str, ...]:
    notes = []
    if unknown and isinstance(recipe.cache, BudgetCache):
        notes.append(f"a generic schedule: the model is not recognised: {unknown}")
    if not family.declared:
        notes.append(f"hasten has not been tested with {family.name}")
    if getattr(recipe.cache, "fingerprint", None) not in (None, name):
        notes.append(FORCED_SCHEDULE)
    if recipe.quantize is not None and recipe.quantize.fingerprint not in (None, name):
        notes.append(FORCED_SCALES)
    return tuple(notes)


def _family_problems(recipe: Recipe, transformer: Any, family: Family) -> Iterator[Problem]:
    """Sections that need facts about the family that are not declared."""
    blocks = bool(family.stacks)
    compiles = recipe.compile is not None and recipe.compile.mode == "blocks"
    layers = True
    if recipe.attention is not None:
        from hasten.passes.attention import attention_layers

        layers = bool(attention_layers(transformer))
    sizes = ("num_attention_heads", "attention_head_dim")
    sized = all(transformer.config.get(name) for name in sizes)
    auto = recipe.attention is not None and recipe.attention.backend == "auto"
    for present, section, requirement, declared in (
        (recipe.quantize, "[quantize]", "repeated blocks", blocks),
        (compiles, 'compile.mode = "blocks"', "repeated blocks", blocks),
        (recipe.fuse, "[fuse]", "conditioning inputs", family.conditioning is not None),
        (recipe.engine, "[engine]", "the parts of an export", family.export is not None),
        (recipe.attention, "[attention]", "attention layers whose backend can be set", layers),
        (auto, 'attention.backend = "auto"', "the sizes of its attention heads", sized),
    ):
        if present and not declared:
            yield Problem(
                f"{section} needs {requirement}, and {family.name} does not declare them",
                f"remove {section.partition(' ')[0]}, or declare them: hasten.register_family",
            )


def _weight_problems(recipe: Recipe, transformer: Any) -> Iterator[Problem]:
    """Sections that need the weights on the device."""
    sections = [name for name in ("quantize", "fuse", "engine") if getattr(recipe, name)]
    from hasten.models.fingerprint import offloaded

    if sections and (how := offloaded(transformer)):
        yield Problem(
            f"the transformer's weights are {how}, and [{sections[0]}] needs them in place",
            "optimise the pipeline before offloading it, or use [offload] in the recipe",
        )


def _text_encoder_problems(recipe: Recipe, pipe: Any) -> Iterator[Problem]:
    if recipe.text is None:
        return
    clip: Any = getattr(pipe, "text_encoder", None)
    t5: Any = getattr(pipe, "text_encoder_2", None)
    if t5 is None and (recipe.text.scheme or clip is None):
        yield Problem(
            "the pipeline has no " + ("text encoders" if clip is None else "text_encoder_2"),
            "load the pipeline with its text encoders, or remove [text] from the recipe",
        )
        return
    if recipe.text.scheme is None:
        return
    from hasten.quantization.plan import plan_problems

    linears = [(name, part) for name, part in t5.named_modules() if type(part).__name__ == "Linear"]
    for fault, fix in plan_problems(t5, linears, Quantize(scheme=recipe.text.scheme)):
        yield Problem(f"text_encoder_2: {fault}", fix)


def _vae_problems(recipe: Recipe, vae: Any) -> Iterator[Problem]:
    if recipe.decoder is not None and vae is None:
        yield Problem(
            "the pipeline has no vae",
            "load the pipeline with it, or remove [decoder] from the recipe",
        )
    elif recipe.decoder and recipe.decoder.compile and vae.decoder._compiled_call_impl is not None:
        yield Problem(
            "the VAE's decoder is already compiled",
            "pass an uncompiled pipeline, or set decoder.compile = false",
        )


def _residual_problems(recipe: Recipe, transformer: Any, family: Family) -> Iterator[Problem]:
    """Why `kind = "residual"` cannot decide between the transformer's blocks."""
    if not isinstance(recipe.cache, ResidualCache):
        return
    if not family.declared or not family.stacks:
        yield Problem(
            f'cache.kind = "residual" needs the blocks of {family.name}, which are not declared',
            'use a planned cache, such as kind = "interval", or declare the family: '
            "hasten.register_family",
        )
        return
    blocks = len(family.repeated_blocks(transformer))
    if recipe.cache.first_blocks >= blocks:
        yield Problem(
            f"cache.first_blocks = {recipe.cache.first_blocks} leaves none of the "
            f"transformer's {blocks} blocks to skip",
            "set a smaller number; 1 is usual",
        )
    if _is_compiled(transformer):
        yield Problem(
            'the transformer was compiled as a whole, and cache.kind = "residual" decides '
            "between its blocks",
            'pass an uncompiled pipeline and set [compile] mode = "blocks", or use a planned '
            'cache, such as kind = "interval"',
        )


def _is_compiled(transformer: Any) -> bool:
    from hasten.step.chain import plain_module

    return plain_module(transformer) is not transformer or (
        transformer._compiled_call_impl is not None
    )


def _is_replaced(transformer: Any) -> bool:
    own = getattr(transformer.forward, "__func__", None) is type(transformer).forward
    return not own or _is_compiled(transformer)


def _forward_problems(recipe: Recipe, transformer: Any) -> Iterator[Problem]:
    """Why the transformer's current forward cannot be replaced."""
    section = "[fuse]" if recipe.fuse is not None else "[engine]" if recipe.engine else None
    if section and _is_replaced(transformer):
        yield Problem(
            "the transformer's forward was replaced or compiled (by offloading, hooks or "
            f"torch.compile), and {section} needs the original one",
            "optimise the plain pipeline, and offload or compile through the recipe or afterwards; "
            f"or remove {section} from the recipe",
        )


def _offload_problems(recipe: Recipe, transformer: Any, family: Family) -> Iterator[Problem]:
    """Why the modulation weights cannot be offloaded to host memory."""
    if recipe.offload is None or recipe.offload.kind != "modulation":
        return
    norms: Any = family.modulated_norms(transformer)
    kinds = {type(norm.linear).__name__ for _, norm in norms}
    if kinds != {"Linear"}:
        yield Problem(
            f'offload.kind = "modulation" moves plain linears, and these are {", ".join(kinds)}',
            "fuse LoRA adapters first: pipe.fuse_lora(), then pipe.unload_lora_weights()",
        )
