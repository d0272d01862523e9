"""Checks of a calibration's inputs that do not need torch."""

from __future__ import annotations

from hasten.errors import InputError
from hasten.quantization.schemes import SCHEMES
from hasten.recipe import Quantize, Recipe


def check_budget(budget: int, steps: int) -> None:
    """Raise an InputError unless `budget` is from 1 to `steps`."""
    if not 1 <= budget <= steps:
        raise InputError(
            f"budget = {budget} is not between 1 and the {steps} steps of a run",
            f"a budget of {max(1, steps // 3)} computes a third of the steps",
        )


def check_held_back(held_back: int, prompts: int) -> None:
    """Raise an InputError unless at least one prompt is held back and one is not."""
    if not 1 <= held_back < prompts:
        raise InputError(
            f"{prompts} prompts are too few for held_back = {held_back}",
            "hold back at least one prompt, and give at least one more; 8 of 24 is usual",
        )


def dynamic(recipe: Recipe) -> Quantize:
    """The recipe's `[quantize]` with dynamic scales in place of any static ones.

    Raises:
        InputError: The recipe has no `[quantize]`, or its scheme does not support static scales.
    """
    if recipe.quantize is None:
        raise InputError(
            f"the recipe {recipe.name} quantises nothing", "give one with [quantize], such as fp8"
        )
    if not SCHEMES[recipe.quantize.scheme].static:
        raise InputError(
            f'the recipe {recipe.name} has scheme = "{recipe.quantize.scheme}", but static scales '
            'require "fp8"',
            'set scheme = "fp8" in it, or use the recipe fp8',
        )
    changes = {"activations": "dynamic", "amax": None, "fingerprint": None}
    return Quantize(**{**dict(recipe.quantize), **changes})
