"""Which family a pipeline belongs to. A family's module is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.families.family import Family

__all__ = ["family_of", "register_family"]

_DECLARED: dict[str, str | Family] = {
    "FluxTransformer2DModel": "hasten.families.flux1:FLUX1",
}
"""By the class name of the transformer: a family, or where it is declared."""


def register_family(transformer_class: str, family: Family) -> None:
    """Declare a family from outside of hasten.

    Args:
        transformer_class: Name of the transformer's class, such as "FluxTransformer2DModel".
        family: What to know of it; replaces an earlier declaration.
    """
    _DECLARED[transformer_class] = family


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, by its transformer's class.

    Returns:
        The declared family; for a class that nobody has declared, one guessed from what Diffusers
        says about it, with `declared` false.

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
            f"{type(pipe).__name__} has no transformer, so there is nothing to speed up",
            f"pass a pipeline with a diffusion transformer; tried with: {', '.join(_DECLARED)}",
        )
    return _guessed(transformer)


def _declared(name: str) -> Family:
    known = _DECLARED[name]
    if isinstance(known, str):
        module, _, attribute = known.partition(":")
        known = _DECLARED[name] = getattr(import_module(module), attribute)
    assert not isinstance(known, str)
    return known


def _guessed(transformer: Any) -> Family:
    """Stacks by Diffusers' own declarations: module lists of the classes that it repeats."""
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
