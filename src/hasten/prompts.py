"""Sets of prompts: bundled ones by name, or a text file with one prompt a line. No torch."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from hasten.errors import InputError

__all__ = ["BUNDLED", "prompt_hash", "read_prompts"]

BUNDLED = ("tiny", "general", "tiny-calibration", "general-calibration")
"""`tiny` is written for the bundled model, `general` for models that know the world; `bench` draws
these two, and schedules and scales are learned on the other two."""

FIX = f"give a UTF-8 text file with one prompt a line, or one of {', '.join(BUNDLED)}"


def read_prompts(
    source: str | Path, *, last: int | None = None, limit: int | None = None
) -> list[str]:
    """The prompts of a bundled set or a file, in order; at least one.

    Blank lines and lines that start with `#` are left out. `last` keeps that many from the end,
    then `limit` that many from the start; both may be larger than the set.

    Raises:
        InputError: every fault at once: `last` or `limit` below 1, a file that is missing, a
            directory, unreadable, not UTF-8, or has no prompts.
    """
    faults = [
        f"{name} {value} is not 1 or more"
        for name, value in (("last", last), ("limit", limit))
        if value is not None and value < 1
    ]
    prompts: list[str] = []
    try:
        prompts = _prompts_in(_text_of(source), source)
    except InputError as error:
        faults += error.faults
        raise InputError(faults, error.fix) from None
    if faults:
        raise InputError(faults, f"{source} has {len(prompts)} prompts: ask for 1 or more of them")
    return prompts[-last if last else None :][:limit]


def prompt_hash(prompt: str) -> str:
    """Twelve hexadecimal digits that name a prompt, whatever white space surrounds it.

    Learned schedules list those of their prompts, so that a benchmark can tell whether it scores
    a schedule on what it was learned from.
    """
    return hashlib.sha256(prompt.strip().encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _text_of(source: str | Path) -> str:
    if source in BUNDLED:
        return resources.files("hasten").joinpath(f"assets/prompts/{source}.txt").read_text("utf-8")
    path = Path(source).expanduser()
    try:
        # utf-8-sig: editors on Windows put a byte order mark before the first prompt.
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})", FIX) from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory, not a file of prompts", FIX) from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of prompts", FIX) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}", FIX) from None


def _prompts_in(text: str, source: str | Path) -> list[str]:
    # Not splitlines(): a form feed or a U+2028 inside a prompt does not end it.
    lines = (line.strip() for line in text.split("\n"))
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"{source}: there are no prompts in it", FIX)
    return prompts
