"""The recipe reference, made from the schema: each key with its type, default and range."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import hasten.recipe
from hasten.recipe import Recipe

__all__ = ["keys", "reference"]

SCHEMA = Recipe.json_schema()
TYPES = {"boolean": "true or false", "integer": "integer", "number": "number", "string": "string"}
LIMITS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}"}
HEAD = ["| key | type | default | range | meaning |", "| :-- | :-- | :-- | :-- | :-- |"]


def reference() -> str:
    """All of it as Markdown: the keys at the top of a recipe, then one heading per section."""
    plain = {name: of for name, of in SCHEMA["properties"].items() if not _sections(of)}
    parts = ["## Top level", _document(Recipe), _table({"properties": plain})]
    for name, of in SCHEMA["properties"].items():
        kinds = _sections(of)
        if kinds:
            parts.append(f"## `[{name}]` {{ #{name} }}")
        for kind in kinds:
            schema = SCHEMA["$defs"][kind]
            if len(kinds) > 1:
                word = schema["properties"]["kind"]["const"]
                parts.append(f'### `kind = "{word}"` {{ #{name}-{word} }}')
            parts += [_document(getattr(hasten.recipe, kind)), _table(schema)]
    return "\n\n".join(parts)


def keys(section: str) -> str:
    """The table of one section, by the name of its class: `Quantize`, `IntervalCache`."""
    return _table(SCHEMA["$defs"][section])


def _sections(schema: dict[str, Any]) -> list[str]:
    """The classes behind a key of the recipe; none where it is a plain value."""
    found = []
    for option in [schema, *schema.get("anyOf", [])]:
        for one in option.get("oneOf", [option]):
            if reference := one.get("$ref"):
                found.append(reference.rpartition("/")[2])
    return found


def _document(section: type) -> str:
    return inspect.cleandoc(section.__doc__ or "")


def _table(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    lines = list(HEAD)
    for name, of in schema["properties"].items():
        default = "required" if name in required else _shown(of.get("default"))
        value = next((one for one in of.get("anyOf", []) if one.get("type") != "null"), of)
        limits = _limits(value) or "–"
        lines.append(f"| `{name}` | {_type(value)} | {default} | {limits} | {of['description']} |")
    return "\n".join(lines)


def _type(schema: dict[str, Any]) -> str:
    if schema.get("type") == "array":
        plural = f"{_type(schema['items'])}s"
        return f"list of {plural.replace('list of', 'lists of', 1)}"
    if schema.get("type") == "object":
        return f"table of {_type(schema['additionalProperties'])}s"
    return TYPES[schema["type"]]


def _limits(schema: dict[str, Any]) -> str:
    if "const" in schema or "enum" in schema:
        return ", ".join(_shown(one) for one in schema.get("enum", [schema.get("const")]))
    return ", ".join(_bounds(schema))


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    inner = schema.get("items") or schema.get("additionalProperties") or {}
    if least := schema.get("minItems"):
        most = schema.get("maxItems")
        yield f"{least} to {most} entries" if most else "not empty"
    if "minimum" in schema and "maximum" in schema:
        yield f"{_number(schema['minimum'])} to {_number(schema['maximum'])}"
        return
    yield from (text.format(_number(schema[key])) for key, text in LIMITS.items() if key in schema)
    if isinstance(inner, dict) and inner:
        yield from (one if one.startswith("each") else f"each {one}" for one in _bounds(inner))


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else f"{value:.0e}".replace("e+", "e")


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    return "`[]`" if value in ((), []) else f"`{json.dumps(value)}`"
