"""Which linears a recipe quantises, what it leaves alone and why, and what stands in its way.

`skip` patterns are those of a shell (`*`, `?`, `[ab]`; `*` crosses dots) over the linears' names in
the transformer. A module's name stands for all linears in it: "transformer_blocks.0".
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from hasten.errors import Problem, unsupported
from hasten.quantization.schemes import SCHEMES
from hasten.recipe import Quantize

Linears = Sequence[tuple[str, nn.Linear]]
"""Linears of a transformer by their names in it."""

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODULATION = "modulation: sees one row a step, not every token"
OUTSIDE = "outside the repeated blocks: few weights, and all of the picture passes through them"


@dataclass(frozen=True)
class LinearPlan:
    """Names of the linears to quantise, in the order given; what is left alone and why."""

    names: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]


def plan_linears(transformer: nn.Module, linears: Linears, recipe: Quantize) -> LinearPlan:
    """Choose among `linears`; the transformer's other linears are left alone.

    Raises UnsupportedError with everything that `plan_problems` finds.
    """
    if found := plan_problems(transformer, linears, recipe):
        raise unsupported(found)
    skipped, misfits, chosen = _sorted_out(linears, recipe)
    return LinearPlan(
        names=tuple(chosen),
        left_alone=(
            *((pattern, _asked(skipped, pattern)) for pattern in recipe.skip),
            *_by_reason(misfits),
            *_never_quantised(transformer, linears),
        ),
    )


def plan_problems(transformer: nn.Module, linears: Linears, recipe: Quantize) -> list[Problem]:
    """Why these linears cannot be quantised as the recipe asks; empty where they can."""
    if adapted := adapted_layers(transformer):
        return [
            Problem(
                f"{len(adapted)} linears carry LoRA adapters ({adapted[0]}, …), which would be "
                "rounded or lost",
                "pipe.fuse_lora() and then pipe.unload_lora_weights() before quantising",
            )
        ]
    special = [(name, why) for name, linear in linears if (why := _not_plain(linear))]
    if special or not linears:
        return [_not_plain_problem(special)]
    found = [
        _no_match(pattern, linears) for pattern in _idle_patterns(transformer, linears, recipe)
    ]
    _, misfits, chosen = _sorted_out(linears, recipe)
    if not chosen and not found:
        why = next(iter(misfits.values()), "skip covers all of them")
        found.append(
            Problem(
                f"none of the {len(linears)} linears is left to quantise: {why}",
                'shorten quantize.skip, use scheme = "int8-weight", or leave [quantize] out',
            )
        )
    return [*found, *_amax_problems(recipe, linears, chosen)]


def special_weight(weight: Tensor, dtypes: Sequence[torch.dtype] = PLAIN_DTYPES) -> str:
    """What a weight is if not a plain parameter of one of these dtypes; empty where it is one.

    Libraries that quantise put a tensor class of theirs in its place, or codes of 8 bits.
    """
    if type(weight) is not nn.Parameter:
        return f"of class {type(weight).__name__}"
    if weight.dtype not in dtypes:
        return f"stored in {str(weight.dtype).removeprefix('torch.')}"
    return ""


def _amax_problems(recipe: Quantize, linears: Linears, chosen: Sequence[str]) -> list[Problem]:
    """Linears without a calibrated scale, and scales of linears that there are not.

    A scale of a linear that is skipped is left over from the calibration, and no fault.
    """
    if recipe.amax is None:
        return []
    known = {name for name, _ in linears}
    found = (
        ("no value for", [name for name in chosen if name not in recipe.amax]),
        ("no quantisable linear is called", [name for name in recipe.amax if name not in known]),
    )
    faults = [f"{what} {names[0]} ({len(names)} in all)" for what, names in found if names]
    if not faults:
        return []
    return [
        Problem(
            f"quantize.amax: {'; '.join(faults)}",
            "`hasten calibrate-scales --recipe FILE.toml` measures it again for this model, "
            'or set activations = "dynamic" and remove it',
        )
    ]


def _sorted_out(linears: Linears, recipe: Quantize) -> tuple[list[str], dict[str, str], list[str]]:
    """Names skipped, (name -> why its shape does not do), names to quantise."""
    skipped: list[str] = []
    misfits: dict[str, str] = {}
    chosen = []
    multiple = SCHEMES[recipe.scheme].multiple_of
    for name, linear in linears:
        if any(_matches(name, pattern) for pattern in recipe.skip):
            skipped.append(name)
        elif linear.in_features % multiple or linear.out_features % multiple:
            misfits[name] = (
                f"{linear.in_features} inputs, {linear.out_features} outputs: "
                f"{recipe.scheme} needs multiples of {multiple}"
            )
        else:
            chosen.append(name)
    return skipped, misfits, chosen


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _idle_patterns(transformer: nn.Module, linears: Linears, recipe: Quantize) -> list[str]:
    """Patterns that match no linear at all, quantised or not."""
    names = {name for name, _ in linears} | {name for name, _ in _linears_of(transformer)}
    return [
        pattern for pattern in recipe.skip if not any(_matches(name, pattern) for name in names)
    ]


def _no_match(pattern: str, linears: Linears) -> Problem:
    known = dict.fromkeys(form for name, _ in linears for form in _patterns_for(name))
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    nearest = f"nearest: {', '.join(close)}; " if close else ""
    return Problem(
        f"quantize.skip: {pattern!r} matches no linear",
        f"{nearest}`hasten layers --json` lists the linears",
    )


def _patterns_for(name: str) -> Iterable[str]:
    """The name itself, the blocks it is in, and its last words in any block."""
    words = name.split(".")
    yield name
    for length in range(1, len(words)):
        yield ".".join([*words[:length], "*"])
        yield ".".join(["*", *words[length:]])


def adapted_layers(transformer: nn.Module) -> list[str]:
    """Layers that PEFT has wrapped for LoRA: they keep the original as `base_layer`."""
    return [name for name, module in transformer.named_modules() if hasattr(module, "base_layer")]


def _not_plain(linear: nn.Linear) -> str:
    """Why this is more than a linear with a weight of its own; empty where it is not."""
    if why := special_weight(linear.weight):
        return f"its weight is {why}"
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}"
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    if (
        linear.weight.is_meta
        or hooked
        or hasattr(linear, "_hf_hook")
        or hasattr(linear, "_diffusers_hook")
    ):
        return "offloaded, or with hooks of its own"
    return ""


def _not_plain_problem(special: list[tuple[str, str]]) -> Problem:
    if not special:
        return Problem(
            "the repeated blocks have no plain linears: they are quantised already",
            "load the pipeline again, in bfloat16, float16 or float32",
        )
    name, why = special[0]
    return Problem(
        f"{len(special)} linears cannot be replaced, the first is {name}: {why}",
        "load it in bfloat16, float16 or float32, and let the recipe quantise and offload",
    )


def _asked(skipped: list[str], pattern: str) -> str:
    count = sum(_matches(name, pattern) for name in skipped)
    return f"named by skip, {count} in all" if count else "named by skip, never quantised anyway"


def _by_reason(misfits: dict[str, str]) -> list[tuple[str, str]]:
    """Equal linears of all blocks as one line."""
    counts = Counter((_any_block(name), why) for name, why in misfits.items())
    return [(f"{count} × {name}", why) for (name, why), count in counts.items()]


def _never_quantised(transformer: nn.Module, linears: Linears) -> list[tuple[str, str]]:
    """The transformer's other linears: in the same blocks, then outside them."""
    quantisable = {name for name, _ in linears}
    blocks = {name.split(".")[0] for name in quantisable}
    others = [name for name, _ in _linears_of(transformer) if name not in quantisable]
    inside = dict.fromkeys(_any_block(name) for name in others if name.split(".")[0] in blocks)
    outside = dict.fromkeys(
        name.split(".")[0] for name in others if name.split(".")[0] not in blocks
    )
    found = ((", ".join(inside), MODULATION), (", ".join(outside), OUTSIDE))
    return [(names, why) for names, why in found if names]


def _linears_of(transformer: nn.Module) -> Linears:
    return [
        (name, module)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _any_block(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)
