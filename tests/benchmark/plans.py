"""Plans and stores without looking at the machine."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.benchmark.plan import BenchmarkPlan, Options, resolve_workload
from hasten.benchmark.rows import plan_rows
from hasten.errors import Faults
from hasten.recipe import Recipe
from hasten.results import Environment

FAKE = "tests.benchmark.fake_engine"
ENVIRONMENT = Environment(
    device="cpu", torch="2", diffusers="1", hasten="0", date="2026-01-02T03:04:05+00:00"
)


def make_plan(
    recipes: Sequence[Recipe], *, references: Sequence[str] = ("baseline",), **options: Any
) -> BenchmarkPlan:
    """A plan on the CPU; by default 2 prompts of 48x32 pixels in 6 steps."""
    given = {
        "model": "owner/name",
        "limit": 2,
        "size": "48x32",
        "steps": 6,
        "prompts": "general",
        **options,
    }
    faults = Faults()
    workload = resolve_workload(Options(dtype="float32", **given), faults)
    rows = plan_rows(recipes, workload.steps, references, faults)
    faults.raise_any()
    return BenchmarkPlan(workload, ENVIRONMENT, rows, tuple(references))


def odd(description: str) -> Recipe:
    """A recipe whose description tells the fake engine how to go wrong."""
    return Recipe(name=description.replace(" ", "-"), description=description)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


ODD = [
    *(b"null", b"-1", b"0", b"1e999", b"1e308", b"1e-320", b"NaN", b"9" * 400, b"true"),
    *(b'""', b"[]", b"{}", b"[[[]]]", b'"../x"', b'"\\u0000"', b'"\\ud800"', b'"\\u001b[31m"'),
]


def damage(whole: bytes, rng: random.Random) -> bytes:
    """A file after an accident or an edit: cut, flipped bits, other digits, lost or doubled parts,
    values of other types."""
    text = bytearray(whole)
    start = rng.randrange(len(text))
    stop = min(len(text), start + rng.randrange(1, 40))
    match rng.randrange(8):
        case 0:
            del text[start:]
        case 1:
            text[start] ^= 1 << rng.randrange(8)
        case 2:
            del text[start:stop]
        case 3:
            text[start:start] = text[start:stop]
        case 4:
            text[start:stop] = rng.randbytes(stop - start)
        case 5:
            text[start:start] = rng.choice([b"[" * 5000, b"9" * 5000, b"\0", b"\xff", b"{}"])
        case 6:
            digits = [place for place, byte in enumerate(text) if chr(byte).isdigit()]
            text[rng.choice(digits)] = ord(rng.choice("0123456789"))
        case _:
            values = list(re.finditer(rb'(?<=: )("[^"]*"|[\d.]+|null|true|false)', whole))
            if values:
                first, last = rng.choice(values).span()
                text[first:last] = rng.choice(ODD)
    return bytes(text)
