"""Every conflict of recipe × model × machine, found before anything is touched.

What is decided here is the verdict that the passes obey.
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


MARK = "_hasten_optimization"  # attribute of an optimised transformer: what was done to it

FORCED_SCHEDULE = "schedule learned on another model, used by force"
FORCED_SCALES = "static scales calibrated on another model, used by force"


@dataclass(frozen=True)
class Verdict:
    """What the passes do.

    Attributes:
        fingerprint: Of the transformer's weights, where something was learned and they can be read.
        linears: Which linears are quantised; None where none are.
        kernels: Why the blocks do not run on fused kernels; None where they do.
        graphs: Why no CUDA graphs are recorded; None where they are.
        notes: What results must say.
    """

    fingerprint: str | None = None
    linears: LinearPlan | None = None
    kernels: str | None = None
    graphs: str | None = None
    notes: tuple[str, ...] = ()


def problems(recipe: Recipe, machine: Machine, device_type: str) -> list[Problem]:
    """What of this recipe cannot run on a device of this type here. Needs no model."""
    return [
        *_machine_problems(recipe, machine, device_type),
        *conflicts(recipe, device_type),
    ]


def check(
    recipe: Recipe, pipe: Any, family: Family, machine: Machine, *, force: bool = False
) -> Verdict:
    """Decide what the passes do.

    Args:
        recipe: What was asked for.
        pipe: The plain pipeline.
        family: Its transformer's.
        machine: What this machine can do.
        force: Accept a schedule and static scales that were learned on another model.

    Raises:
        UnsupportedError: Everything that stands in the way, at once.
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
            "hasten.restore(pipe) makes it plain again",
        )


def empty_weights(transformer: Any) -> Problem | None:
    """Weights that an engine has let go of; None where all are there."""
    empty = [name for name, weight in transformer.named_parameters() if not weight.numel()]
    if not empty:
        return None
    return Problem(
        f"{len(empty)} parameters of the transformer are empty ({empty[0]}, …), as "
        "engine.release = true leaves them",
        "load the pipeline again",
    )


def _model_problems(recipe: Recipe, pipe: Any, family: Family) -> Iterator[Problem]:
    if trouble := empty_weights(pipe.transformer):
        yield trouble
    if recipe.compile is not None:
        blocks = family.repeated_blocks(pipe.transformer)
        compiled = [name for name, block in blocks if block._compiled_call_impl is not None]
        if compiled or pipe.transformer._compiled_call_impl is not None:
            yield Problem(
                f"the transformer is compiled already ({len(compiled)} of its blocks)",
                "leave the compiling to the recipe, or take [compile] out of it",
            )
    if recipe.cache is not None and not (
        hasattr(pipe.scheduler, "step_index") and hasattr(pipe.scheduler, "sigmas")
    ):
        yield Problem(
            f"{type(pipe.scheduler).__name__} has no step_index or no sigmas",
            "step caching needs a flow-matching scheduler, which has both: "
            "FlowMatchEulerDiscreteScheduler, for example",
        )
    if recipe.cache is not None and getattr(pipe.transformer, "is_cache_enabled", False):
        yield Problem(
            "one of Diffusers' own caches is enabled on the transformer",
            "call pipe.transformer.disable_cache() first",
        )


def _machine_problems(recipe: Recipe, machine: Machine, device_type: str) -> Iterator[Problem]:
    """What this machine lacks."""
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
            'text.scheme = "fp8-weight": there is no FP8 on mps', 'set scheme = "int8-weight"'
        )
    if recipe.compiles or (decoder is not None and decoder.compile):
        instead = "leave decoder.compile out"
        if recipe.compiles:
            plain = "cache" if recipe.cache else "baseline"
            instead = f"use the preset {plain!r}, which needs no compiler"
        if problem := machine.compile_problem(device_type):
            yield Problem(problem.fault, f"{problem.fix}; or {instead}")


def _linear_problems(recipe: Recipe, transformer: Any, family: Family) -> Iterator[Problem]:
    """Why the transformer's linears cannot be quantised as `[quantize]` asks."""
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
    """Why the blocks will not run on fused kernels, once they are quantised; None where they do."""
    if recipe.fuse is None or recipe.fuse.kernels == "off":
        return 'kernels = "off"'
    if why := why_no_kernels(recipe):
        return why
    if family.kernels is None:
        return f"there are no fused kernels for {family.name}: only FLUX.1 has them"
    reasons = family.kernels.reasons_against(transformer, _to_be(recipe, transformer, family))
    return reasons[0] if reasons else None


def _to_be(recipe: Recipe, transformer: Any, family: Family) -> Mapping[Any, type]:
    """What `[quantize]` will put in the place of linears before the kernels take over."""
    plan = _plan(recipe, transformer, family)
    if plan is None or recipe.quantize is None:
        return {}
    from hasten.quantization.linear import linear_class

    kind, names = linear_class(recipe.quantize), set(plan.names)
    return {linear: kind for name, linear in family.quantizable(transformer) if name in names}


def _fingerprint(recipe: Recipe, transformer: Any) -> tuple[str | None, str]:
    """The weights' fingerprint where something learned is compared with it; else None, and why it
    cannot be had."""
    cache = recipe.cache
    learned = isinstance(cache, BudgetCache | ScheduleCache)
    if not learned and (recipe.quantize is None or recipe.quantize.fingerprint is None):
        return None, ""
    from hasten.models.fingerprint import fingerprint, unreadable

    why = unreadable(transformer)
    return (None, why) if why else (fingerprint(transformer), "")


def _learned_problems(recipe: Recipe, name: str | None, unknown: str) -> Iterator[Problem]:
    """A schedule or static scales that were learned on another model, or on who knows which."""
    here = f"this one is {name}" if name else f"of this one it is not known: {unknown}"
    schedule: str | None = getattr(recipe.cache, "fingerprint", None)
    if schedule not in (None, name):
        yield Problem(
            f"the schedule was learned on another model ({schedule}; {here})",
            "learn one for this model with `hasten calibrate`, or insist with --force (force=True)",
        )
    scales = recipe.quantize.fingerprint if recipe.quantize else None
    if scales not in (None, name):
        yield Problem(
            f"the static scales were calibrated on another model ({scales}; {here})",
            "calibrate this one with `hasten calibrate-scales`, or insist with --force "
            "(force=True)",
        )


def _notes(recipe: Recipe, family: Family, name: str | None, unknown: str) -> tuple[str, ...]:
    notes = []
    if unknown and isinstance(recipe.cache, BudgetCache):
        notes.append(f"a generic schedule, since the model is not recognised: {unknown}")
    if not family.declared:
        notes.append(f"hasten was not tried with {family.name}")
    if getattr(recipe.cache, "fingerprint", None) not in (None, name):
        notes.append(FORCED_SCHEDULE)
    if recipe.quantize is not None and recipe.quantize.fingerprint not in (None, name):
        notes.append(FORCED_SCALES)
    return tuple(notes)


def _family_problems(recipe: Recipe, transformer: Any, family: Family) -> Iterator[Problem]:
    """Sections that need something of the family which nobody has declared."""
    blocks = bool(family.stacks)
    compiles = recipe.compile is not None and recipe.compile.mode == "blocks"
    layers = True
    if recipe.attention is not None:
        from hasten.passes.attention import attention_layers

        layers = bool(attention_layers(transformer))
    sizes = ("num_attention_heads", "attention_head_dim")
    sized = all(transformer.config.get(name) for name in sizes)
    auto = recipe.attention is not None and recipe.attention.backend == "auto"
    for there, section, knowledge, known in (
        (recipe.quantize, "[quantize]", "which blocks it repeats", blocks),
        (compiles, 'compile.mode = "blocks"', "which blocks it repeats", blocks),
        (recipe.fuse, "[fuse]", "how it is conditioned", family.conditioning is not None),
        (recipe.engine, "[engine]", "how it is exported", family.export is not None),
        (recipe.attention, "[attention]", "attention layers whose backend can be set", layers),
        (auto, 'attention.backend = "auto"', "the sizes of its attention heads", sized),
    ):
        if there and not known:
            yield Problem(
                f"{section} needs to know of {family.name} {knowledge}, and it is not declared",
                f"leave {section.partition(' ')[0]} out, or declare it: hasten.register_family",
            )


def _weight_problems(recipe: Recipe, transformer: Any) -> Iterator[Problem]:
    """Sections that need the weights where they are used."""
    sections = [name for name in ("quantize", "fuse", "engine") if getattr(recipe, name)]
    from hasten.models.fingerprint import offloaded

    if sections and (how := offloaded(transformer)):
        yield Problem(
            f"the transformer's weights are {how}, and [{sections[0]}] needs them in place",
            "optimise the pipeline before it is offloaded, or let the recipe offload it",
        )


def _text_encoder_problems(recipe: Recipe, pipe: Any) -> Iterator[Problem]:
    if recipe.text is None:
        return
    clip: Any = getattr(pipe, "text_encoder", None)
    t5: Any = getattr(pipe, "text_encoder_2", None)
    if t5 is None and (recipe.text.scheme or clip is None):
        yield Problem(
            "the pipeline has no " + ("text encoders" if clip is None else "text_encoder_2"),
            "load the pipeline with its text encoders, or take [text] out of the recipe",
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
            "load the pipeline with it, or take [decoder] out of the recipe",
        )
    elif recipe.decoder and recipe.decoder.compile and vae.decoder._compiled_call_impl is not None:
        yield Problem(
            "the VAE's decoder is compiled already",
            "leave the compiling to the recipe, or set decoder.compile = false",
        )


def _residual_problems(recipe: Recipe, transformer: Any, family: Family) -> Iterator[Problem]:
    """Why it cannot be decided between the transformer's blocks."""
    if not isinstance(recipe.cache, ResidualCache):
        return
    if not family.declared or not family.stacks:
        yield Problem(
            f'cache.kind = "residual" needs to know the blocks of {family.name}',
            'use a planned cache, such as kind = "interval", or declare the family: '
            "hasten.register_family",
        )
        return
    blocks = len(family.repeated_blocks(transformer))
    if recipe.cache.first_blocks >= blocks:
        yield Problem(
            f"cache.first_blocks = {recipe.cache.first_blocks} leaves none of the "
            f"transformer's {blocks} blocks to skip",
            "one first block is the usual number",
        )
    if _is_compiled(transformer):
        yield Problem(
            'the transformer was compiled as a whole, and cache.kind = "residual" decides '
            "between its blocks",
            'leave the compiling to the recipe ([compile] mode = "blocks"), or use a planned '
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
    """Why nothing can be put in the place of the forward that this transformer has now."""
    section = "[fuse]" if recipe.fuse is not None else "[engine]" if recipe.engine else None
    if section and _is_replaced(transformer):
        yield Problem(
            "the transformer's forward was replaced or compiled (by offloading, hooks or "
            f"torch.compile), and {section} puts its own in its place",
            "optimise the plain pipeline and put such things into the recipe, or around it "
            f"afterwards; or take {section} out of the recipe",
        )


def _offload_problems(recipe: Recipe, transformer: Any, family: Family) -> Iterator[Problem]:
    """Why the modulation weights cannot wait in host memory."""
    if recipe.offload is None or recipe.offload.kind != "modulation":
        return
    norms: Any = family.modulated_norms(transformer)
    kinds = {type(norm.linear).__name__ for _, norm in norms}
    if kinds != {"Linear"}:
        yield Problem(
            f'offload.kind = "modulation" moves plain linears, and there are {", ".join(kinds)}',
            "fuse LoRA adapters first: pipe.fuse_lora(), then pipe.unload_lora_weights()",
        )
