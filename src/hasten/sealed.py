"""JSON with a checksum over its content.

All JSON files that hasten itself reads back (rows of a benchmark, trials of a calibration,
manifests) are sealed. The checksum detects damage and edits; it does not protect against attackers.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

CHECKSUM = "sha256"
Model = TypeVar("Model", bound=BaseModel)


class DamagedError(ValueError):
    """The text is not sealed, damaged or edited; the message explains how."""


def seal(content: dict[str, Any], *, indent: int | None = None) -> str:
    """Serialise `content` as JSON, with its checksum under the key `sha256`.

    Args:
        content: JSON values. An existing key `sha256` is replaced.
        indent: As in `json.dumps`. It does not change the checksum.
    """
    body = {name: value for name, value in content.items() if name != CHECKSUM}
    return json.dumps(body | {CHECKSUM: _checksum(body)}, indent=indent, ensure_ascii=False)


def unseal(text: str | bytes) -> dict[str, Any]:
    """The content of sealed text, without the checksum.

    Raises:
        DamagedError: The text is not JSON, or its checksum is missing or wrong.
    """
    content = parse_json(text)
    if not isinstance(content, dict) or CHECKSUM not in content:
        raise DamagedError("it has no checksum")
    expected = content.pop(CHECKSUM)
    if expected != _checksum(content):
        raise DamagedError("it was damaged or edited: the checksum differs")
    return content


def unseal_file(path: Path, kind: type[Model]) -> Model | None:
    """Read a sealed file.

    Args:
        path: A regular file; links are not followed.
        kind: The pydantic model of its content.

    Returns:
        The content; None if there is no file.

    Raises:
        DamagedError: The file is a link or a device, cannot be read, is damaged, or was written by
            an incompatible version.
    """
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        raise DamagedError("it is a link or a device, not a file")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}") from None
    content = unseal(text)
    try:
        return kind.model_validate(content)
    except ValueError:
        raise DamagedError("it was written by an incompatible version") from None


def parse_json(text: str | bytes) -> Any:
    """`json.loads` with a single kind of error.

    Raises:
        DamagedError: The text is not UTF-8, is not JSON, is nested too deeply, or has a number with
            too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise DamagedError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise DamagedError(f"it is not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise DamagedError(f"it is not valid JSON: {' '.join(str(error).split())[:200]}") from None


def first_fault(error: ValueError) -> str:
    """The message of a DamagedError, or the first fault of a ValidationError, as one line."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
