"""The registry of model families. A family's module is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.families.family import Family

__all__ = ["family_of", "register_family"]

_DECLARED: dict[str, str | Family] = {
    "FluxTransformer2DModel": "hasten.families.flux1:FLUX1",
}
"""Families, or the modules that declare them, by the class name of the transformer."""


def register_family(transformer_class: str, family: Family) -> None:
    """Declare a family from outside hasten.

    Args:
        transformer_class: Name of the transformer's class, such as "FluxTransformer2DModel".
        family: The family; it replaces an earlier declaration.
    """
    _DECLARED[transformer_class] = family


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, by its transformer's class.

    Returns:
        The declared family; for an undeclared class, one derived from the attributes that Diffusers
        sets on the class, with `declared` false.

    Raises:
        UnsupportedError: The pipeline has no transformer.
    """
    from torch import nn

    from hasten.errors import UnsupportedError
    from hasten.step.chain import plain_module

    transformer = plain_module(getattr(pipe, "transformer", None))
    name = type(transformer).__name__
    if name in _DECLARED:
        return _declared(name)
    if not isinstance(transformer, nn.Module):
        raise UnsupportedError(
            f"{type(pipe).__name__} has no transformer to optimise",
            f"pass a pipeline with a diffusion transformer; tested: {', '.join(_DECLARED)}",
        )
    return _guessed(transformer)


def _declared(name: str) -> Family:
    entry = _DECLARED[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = _DECLARED[name] = getattr(import_module(module), attribute)
    assert not isinstance(entry, str)
    return entry


def _guessed(transformer: Any) -> Family:
    """Derive the stacks from Diffusers' declarations: module lists of its repeated classes."""
    from torch import nn

    from hasten.families.family import Family, Stack

    cls = type(transformer)
    repeated = {
        *(getattr(cls, "_repeated_blocks", None) or ()),
        *(getattr(cls, "_no_split_modules", None) or ()),
    }
    stacks = tuple(
        Stack(name)
        for name, child in transformer.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and type(child[0]).__name__ in repeated
    )
    return Family(cls.__name__, stacks, declared=False)
