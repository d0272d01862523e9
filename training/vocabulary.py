"""What the bundled model can draw: things, two styles and twelve background colours.

A *picture* is one (thing, style); a *triple* is (thing, style, colour). Fifteen in a hundred
triples, chosen by a hash of their names, are kept out of all training, so that evaluation can ask
for combinations that were never seen together.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["COLOURS", "HOLD_OUT", "STYLES", "Style", "Thing", "held_out", "things", "unit_hash"]

HOLD_OUT = 0.15
VOCABULARY = Path(__file__).with_name("vocabulary.txt")

# sRGB, 0..255: far apart from each other, and none of them neon.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 56, 56),
    "orange": (240, 144, 48),
    "yellow": (250, 214, 80),
    "green": (72, 168, 88),
    "teal": (32, 152, 152),
    "blue": (58, 110, 216),
    "purple": (136, 80, 190),
    "pink": (246, 164, 198),
    "brown": (132, 92, 62),
    "black": (30, 30, 34),
    "gray": (150, 151, 156),
    "white": (247, 247, 247),
}


@dataclass(frozen=True)
class Style:
    """A drawing style: `name` in hashes and files, `phrases` in captions, the usual one first."""

    name: str
    phrases: tuple[str, ...]


STYLES = (
    Style("3d", ("a 3D render of {}", "a 3D icon of {}", "{}, 3D render")),
    Style("flat", ("a flat drawing of {}", "a flat icon of {}", "{}, flat drawing")),
)


@dataclass(frozen=True)
class Thing:
    """A drawable thing: the emoji's `label`, and its `names` in captions, article included."""

    label: str
    names: tuple[str, ...]


def with_article(name: str) -> str:
    """`name` with its indefinite article; a leading `*` marks a name that takes none."""
    if name.startswith("*"):
        return name[1:]
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def parse(line: str) -> Thing:
    """One vocabulary line, `label | name | other names`; the label alone names itself."""
    label, *names = [part.strip() for part in line.split("|")]
    return Thing(label, tuple(with_article(name) for name in (names or [label])))


@cache
def things() -> tuple[Thing, ...]:
    """The vocabulary in file order."""
    lines = VOCABULARY.read_text(encoding="utf-8").splitlines()
    return tuple(parse(line) for line in lines if line.strip() and not line.startswith("#"))


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone, the same on every machine."""
    digest = hashlib.sha256("|".join(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def held_out(thing: str, style: str, colour: str) -> bool:
    """Whether the triple (thing label, style name, colour name) is kept out of training."""
    return unit_hash("triple", thing, style, colour) < HOLD_OUT
