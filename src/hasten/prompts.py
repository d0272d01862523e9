"""Sets of prompts: bundled ones, or a file of text, CSV, TSV or JSON lines.

This module does not import torch.
"""

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
"""`tiny` is for the bundled model, `general` for full-size models. `bench` uses these two by
default; schedules and scales are calibrated on the other two."""

NAMES = ("prompt", "prompts")  # of the column or key with the prompts, in any case

FIX = (
    "give a text file with one prompt per line, .csv or .tsv with a column prompt, .jsonl with a "
    f"key prompt, or one of {', '.join(BUNDLED)}"
)


def read_prompts(
    source: str | Path, *, last: int | None = None, limit: int | None = None
) -> list[str]:
    """Read the prompts of a bundled set or a file.

    In a `.csv` or `.tsv` file they are in the column `prompt`, in a `.jsonl` file under the key
    `prompt` (or `prompts`, in any case). Other files are text with one prompt per line; blank lines
    and lines that start with `#` are ignored.

    Args:
        source: Name of a bundled set, or path of a file.
        last: Keep only this many prompts from the end. May be larger than the set.
        limit: Of these, keep only this many from the start. May be larger than the set.

    Returns:
        At least one prompt, in the order of the file.

    Raises:
        InputError: `last` or `limit` is below 1, the file cannot be read, is not UTF-8 text or of
            an unsupported format, or has no prompts, or a prompt has control characters. Every
            fault is listed.
    """
    faults = [
        f"{name} {value} is less than 1"
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
        raise InputError(faults, f"give a number from 1 to {len(prompts)}, the size of {source}")
    return prompts[-last if last else None :][:limit]


def prompt_hash(prompt: str) -> str:
    """Hash of a prompt: twelve hexadecimal digits, independent of surrounding white space.

    Learned schedules store the hashes of their prompts, so that a benchmark can report whether it
    scores a schedule on prompts that it was learned on.
    """
    return hashlib.sha256(prompt.strip().encode("utf-8", "surrogatepass")).hexdigest()[:12]


def check_prompt(prompt: str) -> None:
    """Raise InputError for an empty prompt and for one with control characters in it."""
    if not prompt.strip():
        raise InputError("the prompt is empty", 'give one: hasten generate "a red kite"')
    control = control_character(prompt)
    if control and control.startswith("U+D"):  # how Python stores arguments that are not UTF-8
        raise InputError("the prompt is not UTF-8 text", "set the terminal to UTF-8")
    if control:
        raise InputError(f"the prompt contains the control character {control}", "remove it")


def _prompts_of(source: str | Path) -> list[str]:
    if source in BUNDLED:
        bundled = resources.files("hasten").joinpath(f"assets/prompts/{source}.txt")
        return [prompt for prompt in _of_text(bundled.read_text("utf-8")) if prompt]
    path = expand_user(source)
    text = read_text(path, "file of prompts", FIX)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: prompts cannot be read from {path.suffix} files", FIX)
    try:
        lines = [_plain(prompt) for prompt in reader(text)]
    except (csv.Error, DamagedError, _FormatError) as error:
        raise InputError(f"{path}: {error}", FIX) from None
    prompts = [prompt for prompt in lines if prompt]
    if not prompts:
        raise InputError(f"{path}: the file has no prompts", FIX)
    for number, prompt in enumerate(prompts, 1):
        if character := control_character(prompt):
            raise InputError(
                f"{path}: prompt {number} contains the control character {character}",
                "remove it: prompts are plain text",
            )
    return prompts


def _plain(prompt: str) -> str:
    """The prompt on one line, without byte order marks, which concatenated files may have."""
    return re.sub(r"\s*[\r\n]+\s*", " ", prompt.replace("\ufeff", "")).strip()


class _FormatError(ValueError):
    """A file's content does not have the format of its suffix; the message explains why."""


def _of_text(text: str) -> Iterator[str]:
    # Not splitlines(), which also splits at a form feed or U+2028 inside a prompt.
    lines = (_plain(line) for line in re.split(r"\r\n?|\n", text))
    return (line for line in lines if not line.startswith("#"))


def _of_table(delimiter: str) -> Callable[[str], Iterator[str]]:
    def read(text: str) -> Iterator[str]:
        # newline="": the csv module handles line breaks within quotes.
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        head = next(rows, [])
        columns = [i for i, name in enumerate(head) if _plain(name).casefold() in NAMES]
        if len(columns) != 1:
            raise _FormatError(f"the columns are {', '.join(head)}; one must be named prompt")
        for row in rows:
            if len(row) > len(head):
                raise _FormatError(
                    f"line {rows.line_num} has {len(row)} columns, but the first line {len(head)}: "
                    "a prompt that contains the separator must be quoted"
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
