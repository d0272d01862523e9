"""Damage to valid input: the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from hasten.errors import LONGEST_FAULT, LONGEST_FIX, HastenError

SEED = 13


def damaged(content: bytes, pieces: Sequence[bytes], number: int) -> Iterator[bytes]:
    """So many versions of `content`, each with one to three changes.

    pieces: what to insert, chosen to be difficult for the format.
    """
    rng = random.Random(SEED)
    for _ in range(number):
        version = content
        for _ in range(rng.randint(1, 3)):
            version = _changed(version, pieces, rng)
        yield version


def _changed(content: bytes, pieces: Sequence[bytes], rng: random.Random) -> bytes:
    start = rng.randint(0, len(content))
    end = min(len(content), start + rng.choice((1, 1, 4, 40)))
    middle = rng.choice(
        (
            b"",  # removed
            content[start:end] * 2,
            bytes([rng.randrange(256)]),
            rng.choice(pieces),
            rng.choice(pieces),
            rng.choice(pieces),
        )
    )
    if rng.random() < 0.1:  # cut off
        return content[:start] + middle
    lines = content.split(b"\n")
    if rng.random() < 0.3:  # in place of the value that stands on a line
        at = rng.randrange(len(lines))
        for separator in (b"=", b":"):
            key, found, _ = lines[at].partition(separator)
            if found:
                lines[at] = key + found + rng.choice(pieces)
                return b"\n".join(lines)
    return content[:start] + middle + content[end if rng.random() < 0.5 else start :]


def refused_well(use: Callable[..., object], *arguments: object) -> bool:
    """Whether `use` raised a HastenError, which must be fit to print; anything else is raised."""
    refusal = None
    try:
        use(*arguments)
    except HastenError as error:
        refusal = error
    if refusal is None:
        return False
    assert refusal.faults
    assert all(fault and fault.isprintable() for fault in refusal.faults)
    assert all(len(fault) <= LONGEST_FAULT for fault in refusal.faults)
    assert len(refusal.fix) <= LONGEST_FIX
    return True
