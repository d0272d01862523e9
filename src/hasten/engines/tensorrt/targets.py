"""The GPUs that engines can be built for, and their precisions. Imports no torch or TensorRT."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Literal, get_args

from hasten.errors import Faults, InputError, UnsupportedError

Precision = Literal["bf16", "fp16", "fp8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

# The targets of TensorRT for RTX 1.7: the members of its ComputeCapability.
TARGETS = {
    "sm75": "Turing: RTX 20, T4",
    "sm80": "Ampere: A100",
    "sm86": "Ampere: RTX 30, A10, A40",
    "sm89": "Ada: RTX 40, L4, L40S",
    "sm120": "Blackwell: RTX 50, RTX PRO",
    "sm121": "Blackwell: GB10",
}
DATACENTER = {"sm90": "Hopper: H100, H200", "sm100": "Blackwell: B200", "sm103": "Blackwell: B300"}

# The first generation whose tensor cores support the type; the builder rejects older ones.
FIRST = {"fp16": (7, 5), "bf16": (8, 0), "fp8": (8, 9)}


def parse_targets(text: str) -> tuple[str, ...]:
    """Parse a list of targets: `"sm89,sm86"` -> `("sm86", "sm89")`, `"none"` -> `()`.

    The syntax is checked here; `check_targets` checks whether an engine can be built.

    Returns:
        Distinct targets, sorted by generation.

    Raises:
        InputError: A word is not a target; all such words are listed.
    """
    words = [word.strip().lower() for word in text.split(",")]
    if words == ["none"]:
        return ()
    strange = [word for word in words if re.fullmatch(r"sm\d{2,3}", word) is None]
    if strange:
        raise InputError([f"{word!r} is not a target" for word in strange], _nearest(strange[0]))
    return tuple(sorted(set(words), key=capability_of))


def check_targets(targets: Sequence[str], precision: str) -> None:
    """Check that engines of this precision can be built for these targets.

    Raises:
        HastenError: They cannot; all problems are listed.
    """
    faults = Faults()
    if precision not in PRECISIONS:
        faults.add(
            f"precision {precision!r} is not one of {', '.join(PRECISIONS)}",
            "fp8 for sm89 and later, bf16 for sm80 and later, fp16 for all",
        )
    for target in targets:
        with faults.gather():
            _check(target, precision)
    faults.raise_any()


def capability_of(target: str) -> tuple[int, int]:
    """`"sm89"` -> (8, 9), `"sm120"` -> (12, 0)."""
    return divmod(int(target.removeprefix("sm")), 10)


def _check(target: str, precision: str) -> None:
    if target in DATACENTER:
        instead = "fp8" if precision == "fp8" else "lossless"
        raise UnsupportedError(
            f"target {target} ({DATACENTER[target]}): TensorRT for RTX does not build for "
            "datacenter GPUs of this generation",
            f'remove {target}; on this GPU, use the recipe "{instead}" instead of an engine',
        )
    if target not in TARGETS:
        raise InputError(f"unknown target {target}", _nearest(target))
    if precision in FIRST and capability_of(target) < FIRST[precision]:
        works = [name for name in TARGETS if capability_of(name) >= FIRST[precision]]
        other = "bf16" if capability_of(target) >= FIRST["bf16"] else "fp16"
        raise UnsupportedError(
            f"target {target} ({TARGETS[target]}) does not support {precision}",
            f"remove {target} ({precision} works on {', '.join(works)}), or export it separately "
            f"in {other}",
        )


def _nearest(word: str) -> str:
    close = difflib.get_close_matches(word, TARGETS, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}targets: {', '.join(TARGETS)}; none for the graph alone"
