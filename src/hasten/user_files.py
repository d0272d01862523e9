"""Reads text files that users write: recipes, prompts and `hasten.json`. Does not import torch."""

from __future__ import annotations

import os
from pathlib import Path

from hasten.errors import InputError

LARGEST = 2**26  # bytes; larger files are no recipe or prompts, and /dev/zero never ends
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks; PowerShell 5 redirects to UTF-16


def read_text(path: str | Path, kind: str, fix: str) -> str:
    """Read a text file in UTF-8 or, if it has a byte order mark, UTF-16.

    Args:
        path: The file; `~` is expanded.
        kind: The kind of file for the error message, such as "recipe file".
        fix: The fix for the error message.

    Raises:
        InputError: The file is missing, a directory, unreadable, larger than 64 MiB, or not text.
    """
    path = expand_user(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such {kind}", fix) from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory, not a {kind}", fix) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}", fix) from None
    if len(content) > LARGEST:
        raise InputError(f"{path}: larger than 64 MiB, so it is not a {kind}", fix)
    encoding = "utf-16" if content.startswith(UTF_16) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise InputError(f"{path}: not {name} text (byte {error.start})", fix) from None


def expand_user(path: str | os.PathLike[str]) -> Path:
    """`Path.expanduser` that raises an InputError for a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{path}: there is no home directory for {Path(path).parts[0]}",
            f"give the full path, or ./{path} for a name that starts with ~",
        ) from None


def control_character(text: str) -> str | None:
    """The first control character or lone surrogate of a text, as `U+001B`; None without one.

    White space is allowed.
    """
    for character in text:
        control = character < " " or "\x7f" <= character <= "\x9f"
        if (control and not character.isspace()) or "\ud800" <= character <= "\udfff":
            return f"U+{ord(character):04X}"
    return None
