"""Sets of prompts: bundled ones by name, or a file of text, CSV, TSV or JSON lines. No torch."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

from hasten.errors import InputError
from hasten.sealed import DamagedError, parse_json
from hasten.user_files import control_character, expand_user, read_text

BUNDLED = ("tiny", "general", "tiny-calibration", "general-calibration")
"""`tiny` is written for the bundled model, `general` for models that know the world; `bench` draws
these two, and schedules and scales are learned on the other two."""

NAMES = ("prompt", "prompts")  # of the column or key that holds them, in any case

FIX = (
    "give a text file with one prompt per line, .csv or .tsv with a column prompt, .jsonl with a "
    f"key prompt, or one of {', '.join(BUNDLED)}"
)


def read_prompts(
    source: str | Path, *, last: int | None = None, limit: int | None = None
) -> list[str]:
    """The prompts of a bundled set or a file, in order; at least one.

    A `.csv` or `.tsv` file has them in the column `prompt`, a `.jsonl` file under the key `prompt`
    (or `prompts`, in any case); other files are text, one prompt per line, without blank lines and
    lines that start with `#`.

    Args:
        source: The name of a bundled set, or the path of a file.
        last: Keep that many prompts from the end; may be larger than the set.
        limit: Then keep that many from the start; may be larger than the set.

    Raises:
        InputError: every fault at once: `last` or `limit` below 1, a file that is missing, a
            directory, unreadable, not UTF-8, of another format, or without prompts, and a prompt
            with control characters.
    """
    faults = [
        f"{name} {value} is not 1 or more"
        for name, value in (("last", last), ("limit", limit))
        if value is not None and value < 1
    ]
    prompts: list[str] = []
    try:
        prompts = _prompts_of(source)
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


def check_prompt(prompt: str) -> None:
    """Raise InputError for an empty prompt and for one with control characters in it."""
    if not prompt.strip():
        raise InputError("the prompt is empty", 'say what to draw: hasten generate "a red kite"')
    found = control_character(prompt)
    if found and found.startswith("U+D"):  # how Python keeps arguments that are not UTF-8
        raise InputError("the prompt is not UTF-8 text", "set the terminal to UTF-8")
    if found:
        raise InputError(f"the prompt has the control character {found}", "remove it")


def _prompts_of(source: str | Path) -> list[str]:
    if source in BUNDLED:
        bundled = resources.files("hasten").joinpath(f"assets/prompts/{source}.txt")
        return [prompt for prompt in _of_text(bundled.read_text("utf-8")) if prompt]
    path = expand_user(source)
    text = read_text(path, "file of prompts", FIX)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: prompts are not read from {path.suffix} files", FIX)
    try:
        found = [_plain(prompt) for prompt in reader(text)]
    except (csv.Error, DamagedError, _FormatError) as error:
        raise InputError(f"{path}: {error}", FIX) from None
    prompts = [prompt for prompt in found if prompt]
    if not prompts:
        raise InputError(f"{path}: there are no prompts in it", FIX)
    for number, prompt in enumerate(prompts, 1):
        if character := control_character(prompt):
            raise InputError(
                f"{path}: prompt {number} has the control character {character}",
                "remove it: a prompt is plain text",
            )
    return prompts


def _plain(prompt: str) -> str:
    """Without byte order marks, which joined files have inside, and on one line."""
    return re.sub(r"\s*[\r\n]+\s*", " ", prompt.replace("\ufeff", "")).strip()


class _FormatError(ValueError):
    """A file is not of the format that its name promises; the message says how."""


def _of_text(text: str) -> Iterator[str]:
    # Not splitlines(): a form feed or a U+2028 inside a prompt does not end it.
    lines = (_plain(line) for line in re.split(r"\r\n?|\n", text))
    return (line for line in lines if not line.startswith("#"))


def _of_table(delimiter: str) -> Callable[[str], Iterator[str]]:
    def read(text: str) -> Iterator[str]:
        # newline="": line breaks within quotes are the csv module's to find.
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        head = next(rows, [])
        columns = [i for i, name in enumerate(head) if _plain(name).casefold() in NAMES]
        if len(columns) != 1:
            raise _FormatError(f"one column must be called prompt; there are {', '.join(head)}")
        for row in rows:
            if len(row) > len(head):
                raise _FormatError(
                    f"line {rows.line_num} has {len(row)} columns and the first line {len(head)}: "
                    "a prompt with a separator in it must be quoted"
                )
            yield row[columns[0]] if len(row) > columns[0] else ""

    return read


def _of_json_lines(text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except DamagedError as error:
            raise DamagedError(f"line {number}: {error}") from None
        if isinstance(value, dict):
            value = next((value[key] for key in value if key.casefold() in NAMES), None)
        if not isinstance(value, str):
            raise _FormatError(f"line {number} has no text under the key prompt")
        yield value


_READERS: dict[str, Callable[[str], Iterator[str]]] = {
    "": _of_text,
    ".txt": _of_text,
    ".csv": _of_table(","),
    ".tsv": _of_table("\t"),
    ".jsonl": _of_json_lines,
    ".ndjson": _of_json_lines,
}
