"""Writes the settings of a row as TOML for the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w

__all__ = ["settings_toml"]


def settings_toml(settings: Mapping[str, Any]) -> str:
    """A TOML document with the table `settings`; nulls are left out."""
    return tomli_w.dumps({"settings": _plain(settings)})


def _plain(value: Any) -> Any:
    """A value that TOML supports: without nulls, and with other types converted to text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value if one is not None]
    return value if isinstance(value, bool | int | float | str) else str(value)
