"""JSON that says whether it is still what was written: content, and a checksum over it.

Everything that hasten writes to read back itself (rows of a benchmark, trials of a calibration,
manifests) is sealed. The checksum finds damage and edits; it is no protection against an attacker.
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
    """The text is not what was sealed; the message says how."""


def seal(content: dict[str, Any], *, indent: int | None = None) -> str:
    """JSON text of `content` with a checksum over it as the key `sha256`.

    Args:
        content: JSON values; a key `sha256` in it is replaced.
        indent: As in `json.dumps`; the checksum does not depend on it.
    """
    body = {name: value for name, value in content.items() if name != CHECKSUM}
    return json.dumps(body | {CHECKSUM: _checksum(body)}, indent=indent, ensure_ascii=False)


def unseal(text: str | bytes) -> dict[str, Any]:
    """The content of a sealed text, without its checksum.

    Raises:
        DamagedError: The text is not JSON, has no checksum, or its content is not what was sealed.
    """
    content = parse_json(text)
    if not isinstance(content, dict) or CHECKSUM not in content:
        raise DamagedError("it has no checksum")
    expected = content.pop(CHECKSUM)
    if expected != _checksum(content):
        raise DamagedError("its content is not what was written: the checksum differs")
    return content


def unseal_file(path: Path, kind: type[Model]) -> Model | None:
    """What a sealed file holds; None where there is no file.

    Args:
        path: A regular file; no link is followed.
        kind: The pydantic model of its content.

    Raises:
        DamagedError: It is a link or a device, cannot be read, is not what was sealed, or another
            version's.
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
        raise DamagedError("its content is not what this version writes") from None


def parse_json(text: str | bytes) -> Any:
    """`json.loads` with one kind of error, whatever is wrong with the text.

    Raises:
        DamagedError: Not UTF-8, not JSON, nested too deeply, or a number with too many digits.
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
    """What a DamagedError or the first fault of pydantic's ValidationError says, in one line."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
