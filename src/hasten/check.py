"""Every conflict of recipe × model × machine, found before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hasten.conflicts import conflicts, kernels_declined
from hasten.errors import AlreadyOptimizedError, unsupported
from hasten.machine import Machine, Problem
from hasten.recipe import Quantize, Recipe, ResidualCache

if TYPE_CHECKING:
    from hasten.families.family import Family

__all__ = ["Problem", "check", "empty_weights", "learned_elsewhere", "problems", "refuse_optimized"]

MARK = "_hasten_recipe"  # set on an optimised transformer: the recipe's name


def problems(recipe: Recipe, machine: Machine, device_type: str) -> list[Problem]:
    """What of this recipe cannot run on a device of this type here. Needs no model."""
    found = _quantize_problems(recipe, machine, device_type)
    compiles = recipe.compile is not None and recipe.compile.mode != "none"
    if compiles and (trouble := machine.compile_problem(device_type)):
        fault, fix = trouble
        rest = "the preset 'cache'" if recipe.cache else "the preset 'baseline'"
        found.append(Problem(fault, f"{fix}; or use {rest}, which needs no compiler"))
    if recipe.engine is not None:
        found += machine.engine_problems(
            device_type,
            recipe.engine.kind,
            recipe.engine.precision,
            exported=recipe.engine.path is not None,
        )
    found += _text_and_decoder_problems(recipe, machine, device_type)
    found += conflicts(recipe, device_type)
    return found


def check(
    recipe: Recipe, pipe: Any, family: Family, machine: Machine, fingerprint: str | None
) -> None:
    """Raise UnsupportedError with every conflict at once; return if there is none.

    `fingerprint` is the model's; None accepts a schedule and static scales of any model.
    """
    found = [
        *problems(recipe, machine, pipe.device.type),
        *_model_problems(recipe, pipe, family),
        *_linear_problems(recipe, pipe.transformer, family),
        *_scale_problems(recipe, fingerprint),
        *_kernel_problems(recipe, pipe.transformer, family),
        *_forward_problems(recipe, pipe.transformer),
        *_offload_problems(recipe, pipe.transformer, family),
        *_residual_problems(recipe, pipe.transformer, family),
        *_text_encoder_problems(recipe, pipe),
        *_vae_problems(recipe, getattr(pipe, "vae", None)),
        *_schedule_problems(recipe, fingerprint),
    ]
    if found:
        raise unsupported(found)


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


def _model_problems(recipe: Recipe, pipe: Any, family: Family) -> list[Problem]:
    found = []
    if trouble := empty_weights(pipe.transformer):
        found.append(trouble)
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


def _quantize_problems(recipe: Recipe, machine: Machine, device_type: str) -> list[Problem]:
    if recipe.quantize is None:
        return []
    trouble = machine.quantize_problem(
        device_type,
        recipe.quantize.scheme,
        emulate=recipe.quantize.emulate,
        compiled=recipe.compile is not None and recipe.compile.mode != "none",
    )
    return [] if trouble is None else [trouble]


def _linear_problems(recipe: Recipe, transformer: Any, family: Family) -> list[Problem]:
    """Why the transformer's linears cannot be quantised as `[quantize]` asks."""
    if recipe.quantize is None:
        return []
    from hasten.quantization.plan import plan_problems

    return plan_problems(transformer, family.quantizable(transformer), recipe.quantize)


def _scale_problems(recipe: Recipe, fingerprint: str | None) -> list[Problem]:
    """Static scales that were calibrated on another model."""
    calibrated_on = recipe.quantize.fingerprint if recipe.quantize else None
    if fingerprint is None or calibrated_on in (None, fingerprint):
        return []
    return [
        Problem(
            f"the static scales were calibrated on another model ({calibrated_on}; this one is "
            f"{fingerprint})",
            "calibrate this one with `hasten calibrate --activations`, or insist with --force "
            "(force=True)",
        )
    ]


def _kernel_problems(recipe: Recipe, transformer: Any, family: Family) -> list[Problem]:
    """Why this transformer cannot run on the fused kernels that the recipe insists on."""
    if recipe.fuse is None or recipe.fuse.kernels != "on":
        return []
    linears = _to_be(recipe, transformer, family)
    return [
        Problem(f'fuse.kernels = "on": {reason}', 'set fuse.kernels = "auto", or "off"')
        for reason in family.reasons_against_kernels(transformer, linears)[:3]
    ]


def _to_be(recipe: Recipe, transformer: Any, family: Family) -> dict[Any, type]:
    """What `[quantize]` will put in the place of linears before the kernels take over."""
    if recipe.quantize is None or kernels_declined(recipe):
        return {}
    if _linear_problems(recipe, transformer, family):
        return {}
    linears = family.quantizable(transformer)
    from hasten.quantization.linear import Fp8Linear, Int8Linear
    from hasten.quantization.plan import make_plan

    kind = {"fp8": Fp8Linear, "int8": Int8Linear}[recipe.quantize.scheme]
    names = set(make_plan(transformer, linears, recipe.quantize).names)
    return {linear: kind for name, linear in linears if name in names}


def _text_and_decoder_problems(recipe: Recipe, machine: Machine, device_type: str) -> list[Problem]:
    found = []
    if recipe.text is not None and recipe.text.scheme == "fp8-weight" and device_type == "mps":
        found.append(
            Problem(
                'text.scheme = "fp8-weight": there is no FP8 on mps', 'set scheme = "int8-weight"'
            )
        )
    alone = recipe.compile is None or recipe.compile.mode == "none"  # nobody else asks this
    if recipe.decoder is not None and recipe.decoder.compile and alone:
        trouble = machine.compile_problem(device_type)
        if trouble is not None:
            fault, fix = trouble
            found.append(Problem(fault, f"{fix}; or leave decoder.compile out"))
    return found


def _text_encoder_problems(recipe: Recipe, pipe: Any) -> list[Problem]:
    if recipe.text is None:
        return []
    clip: Any = getattr(pipe, "text_encoder", None)
    t5: Any = getattr(pipe, "text_encoder_2", None)
    if t5 is None and (recipe.text.scheme or clip is None):
        return [
            Problem(
                "the pipeline has no " + ("text encoders" if clip is None else "text_encoder_2"),
                "load the pipeline with its text encoders, or take [text] out of the recipe",
            )
        ]
    if recipe.text.scheme is None:
        return []
    from hasten.quantization.plan import plan_problems

    linears = [(name, part) for name, part in t5.named_modules() if type(part).__name__ == "Linear"]
    return [
        Problem(f"text_encoder_2: {fault}", fix)
        for fault, fix in plan_problems(t5, linears, Quantize(scheme=recipe.text.scheme))
    ]


def _vae_problems(recipe: Recipe, vae: Any) -> list[Problem]:
    if recipe.decoder is None:
        return []
    if vae is None:
        return [
            Problem(
                "the pipeline has no vae",
                "load the pipeline with it, or take [decoder] out of the recipe",
            )
        ]
    if recipe.decoder.compile and vae.decoder._compiled_call_impl is not None:
        return [
            Problem(
                "the VAE's decoder is compiled already",
                "leave the compiling to the recipe, or set decoder.compile = false",
            )
        ]
    return []


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
    if _is_replaced(transformer):
        found.append(
            Problem(
                "the transformer's forward was replaced or compiled (by offloading, hooks or "
                'torch.compile), and cache.kind = "residual" runs its blocks one by one instead',
                "optimise the plain pipeline and put such things into the recipe, or around it "
                'afterwards; or use a planned cache, such as kind = "interval"',
            )
        )
    return found


def _is_replaced(transformer: Any) -> bool:
    own = getattr(transformer.forward, "__func__", None) is type(transformer).forward
    return not own or transformer._compiled_call_impl is not None


def _forward_problems(recipe: Recipe, transformer: Any) -> list[Problem]:
    """Why another forward cannot take the place of this transformer's."""
    section = "[fuse]" if recipe.fuse is not None else "[engine]" if recipe.engine else None
    if section is None or not _is_replaced(transformer):
        return []
    return [
        Problem(
            "the transformer's forward was replaced or compiled (by offloading, hooks or "
            f"torch.compile), and {section} puts its own in its place",
            "optimise the plain pipeline and put such things into the recipe, or around it "
            f"afterwards; or take {section} out of the recipe",
        )
    ]


def _offload_problems(recipe: Recipe, transformer: Any, family: Family) -> list[Problem]:
    """Why the modulation weights cannot wait in host memory."""
    if recipe.offload is None or recipe.offload.kind != "modulation":
        return []
    kinds = {type(norm.linear).__name__ for _, norm in family.modulated_norms(transformer)}
    if kinds == {"Linear"}:
        return []
    return [
        Problem(
            f'offload.kind = "modulation" moves plain linears, and there are {", ".join(kinds)}',
            "fuse LoRA adapters first: pipe.fuse_lora(), then pipe.unload_lora_weights()",
        )
    ]


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
