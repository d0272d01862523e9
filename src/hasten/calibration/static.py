"""Recipes and static scales: which can have them, and one that has. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from hasten.errors import InputError
from hasten.quantization.schemes import SCHEMES
from hasten.recipe import Quantize, Recipe

__all__ = ["dynamic", "with_static_scales"]

LONGEST_NAME = 64  # of a recipe


def dynamic(recipe: Recipe) -> Quantize:
    """The recipe's `[quantize]` without the static scales that it may have.

    Raises:
        InputError: It quantises nothing, or by a scheme that has no static scales.
    """
    if recipe.quantize is None:
        raise InputError(
            f"the recipe {recipe.name} quantises nothing", "give one with [quantize]: fp8"
        )
    if not SCHEMES[recipe.quantize.scheme].static:
        raise InputError(
            f'the recipe {recipe.name} quantises in "{recipe.quantize.scheme}", and static scales '
            'are for "fp8"',
            'set scheme = "fp8" in it, or give the recipe fp8',
        )
    changes = {"activations": "dynamic", "amax": None, "fingerprint": None}
    return Quantize(**{**dict(recipe.quantize), **changes})


def with_static_scales(recipe: Recipe, amax: Mapping[str, float], fingerprint: str) -> Recipe:
    """The recipe with static scales from these largest inputs of its linears, by name."""
    scales = {"activations": "static", "amax": dict(amax), "fingerprint": fingerprint}
    name = recipe.name.removesuffix("-static")[: LONGEST_NAME - len("-static")]
    return recipe.but(
        name=f"{name}-static",
        description=f"{name} with static scales for the inputs of its linears",
        quantize=Quantize(**{**dict(dynamic(recipe)), **scales}),
    )
