"""What a calibration can work with, checked before torch is loaded."""

from __future__ import annotations

from hasten.errors import InputError
from hasten.quantization.schemes import SCHEMES
from hasten.recipe import Quantize, Recipe


def check_budget(budget: int, steps: int) -> None:
    """Raise InputError unless a run of `steps` steps can compute `budget` of them."""
    if not 1 <= budget <= steps:
        raise InputError(
            f"budget = {budget} is not between 1 and the {steps} steps of a run",
            f"a budget of {max(1, steps // 3)} computes a third of the steps",
        )


def check_held_back(held_back: int, prompts: int) -> None:
    """Raise InputError unless prompts to learn from remain without the ones held back."""
    if not 1 <= held_back < prompts:
        raise InputError(
            f"{prompts} prompts are too few: held_back = {held_back} of them check the result",
            "hold back at least one prompt and keep at least one to learn from; 8 and 16 are usual",
        )


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
