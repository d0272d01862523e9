"""Selects the linears that a recipe quantises, and reports problems and unchanged linears.

`skip` patterns are shell patterns (`*`, `?`, `[ab]`; `*` also matches dots) for the linears' names
in the transformer. A module's name matches all linears in it: "transformer_blocks.0".
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
"""(name, linear) pairs of a transformer."""

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODULATION = "modulation: its input is one row per step, not every token"
OUTSIDE = "outside the repeated blocks: few weights, but their error affects the whole image"


@dataclass(frozen=True)
class LinearPlan:
    """The linears to quantise.

    Attributes:
        names: Their names, in the given order.
        unchanged: Pairs of linears that are not quantised and the reason.
    """

    names: tuple[str, ...]
    unchanged: tuple[tuple[str, str], ...]


def plan_linears(transformer: nn.Module, linears: Linears, recipe: Quantize) -> LinearPlan:
    """Select from `linears`; the transformer's other linears are unchanged.

    Args:
        transformer: The transformer.
        linears: Its quantisable linears.
        recipe: The recipe's section.

    Raises:
        UnsupportedError: `plan_problems` returns problems; all of them are listed.
    """
    if problems := plan_problems(transformer, linears, recipe):
        raise unsupported(problems)
    skipped, misfits, chosen = _sorted_out(linears, recipe)
    return LinearPlan(
        names=tuple(chosen),
        unchanged=(
            *((pattern, _skip_reason(skipped, pattern)) for pattern in recipe.skip),
            *_by_reason(misfits),
            *_never_quantised(transformer, linears),
        ),
    )


def plan_problems(transformer: nn.Module, linears: Linears, recipe: Quantize) -> list[Problem]:
    """Why these linears cannot be quantised under the recipe; empty if they can."""
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
    problems = [
        _no_match(pattern, linears) for pattern in _idle_patterns(transformer, linears, recipe)
    ]
    _, misfits, chosen = _sorted_out(linears, recipe)
    if not chosen and not problems:
        why = next(iter(misfits.values()), "skip covers all of them")
        problems.append(
            Problem(
                f"none of the {len(linears)} linears can be quantised: {why}",
                'shorten quantize.skip, use scheme = "int8-weight", or remove [quantize]',
            )
        )
    return [*problems, *_amax_problems(recipe, linears, chosen)]


def special_weight(weight: Tensor, dtypes: Sequence[torch.dtype] = PLAIN_DTYPES) -> str:
    """Describe a weight that is not a plain parameter of one of these dtypes; empty for others.

    Quantisation libraries replace weights by their own tensor classes or by eight-bit codes.
    """
    if type(weight) is not nn.Parameter:
        return f"of class {type(weight).__name__}"
    if weight.dtype not in dtypes:
        return f"stored in {str(weight.dtype).removeprefix('torch.')}"
    return ""


def _amax_problems(recipe: Quantize, linears: Linears, chosen: Sequence[str]) -> list[Problem]:
    """Linears without a calibrated scale, and scales without a linear.

    Scales of skipped linears are allowed.
    """
    if recipe.amax is None:
        return []
    names = {name for name, _ in linears}
    mismatches = (
        ("no value for", [name for name in chosen if name not in recipe.amax]),
        ("no quantisable linear is called", [name for name in recipe.amax if name not in names]),
    )
    faults = [f"{fault} {names[0]} ({len(names)} in total)" for fault, names in mismatches if names]
    if not faults:
        return []
    return [
        Problem(
            f"quantize.amax: {'; '.join(faults)}",
            "run `hasten calibrate-scales --recipe FILE.toml` for this model, or set "
            'activations = "dynamic" and remove quantize.amax',
        )
    ]


def _sorted_out(linears: Linears, recipe: Quantize) -> tuple[list[str], dict[str, str], list[str]]:
    """Skipped names, names of unsupported shapes with the reason, and names to quantise."""
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
    """Patterns that match no linear, quantisable or not."""
    names = {name for name, _ in linears} | {name for name, _ in _linears_of(transformer)}
    return [
        pattern for pattern in recipe.skip if not any(_matches(name, pattern) for name in names)
    ]


def _no_match(pattern: str, linears: Linears) -> Problem:
    candidates = dict.fromkeys(form for name, _ in linears for form in _patterns_for(name))
    close = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.5)
    similar = f"similar: {', '.join(close)}; " if close else ""
    return Problem(
        f"quantize.skip: {pattern!r} matches no linear",
        f"{similar}`hasten layers --json` lists the linears",
    )


def _patterns_for(name: str) -> Iterable[str]:
    """Patterns that match a name: itself, its parent modules, and its last parts in any block."""
    words = name.split(".")
    yield name
    for length in range(1, len(words)):
        yield ".".join([*words[:length], "*"])
        yield ".".join(["*", *words[length:]])


def adapted_layers(transformer: nn.Module) -> list[str]:
    """Names of the layers that PEFT has wrapped for LoRA, which have a `base_layer`."""
    return [name for name, module in transformer.named_modules() if hasattr(module, "base_layer")]


def _not_plain(linear: nn.Linear) -> str:
    """Why this is not a plain `nn.Linear`; empty if it is one."""
    if why := special_weight(linear.weight):
        return f"its weight is {why}"
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}"
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    if (
        linear.weight.is_meta
        or hooked
        or hasattr(linear, "_hf_hook")
        or hasattr(linear, "_diffusers_hook")
    ):
        return "it is offloaded or has hooks"
    return ""


def _not_plain_problem(special: list[tuple[str, str]]) -> Problem:
    if not special:
        return Problem(
            "the repeated blocks have no plain linears: they are already quantised",
            "load the pipeline again, in bfloat16, float16 or float32",
        )
    name, why = special[0]
    return Problem(
        f"{len(special)} linears cannot be replaced, the first is {name}: {why}",
        "load it in bfloat16, float16 or float32, and use the recipe to quantise and offload",
    )


def _skip_reason(skipped: list[str], pattern: str) -> str:
    count = sum(_matches(name, pattern) for name in skipped)
    return f"skipped by the recipe, {count} in total" if count else "skipped, but never quantised"


def _by_reason(misfits: dict[str, str]) -> list[tuple[str, str]]:
    """One line per group of equal linears in all blocks."""
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
    groups = ((", ".join(inside), MODULATION), (", ".join(outside), OUTSIDE))
    return [(names, why) for names, why in groups if names]


def _linears_of(transformer: nn.Module) -> Linears:
    return [
        (name, module)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _any_block(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)
