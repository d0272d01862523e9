"""Put learned schedules into the package, and the generic plans made from them beside them.

    python -m benchmarks.caching.ship_schedules LEARNED/*.toml

A generic plan keeps the computed steps and noise levels of a learned one and drops what belongs to
its model: fingerprint, fitted weights, error. Linear extrapolation fills the other steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hasten import schedules
from hasten.recipe import Recipe, ScheduleCache, read_recipe

HOME = Path(schedules.__file__).parent


def generic(recipe: Recipe) -> Recipe:
    """The same plan for any FLUX-like model."""
    learned = recipe.cache
    assert isinstance(learned, ScheduleCache)
    plan = ScheduleCache(
        steps=learned.steps, compute=learned.compute, sigmas=learned.sigmas, calibrated=False
    )
    return recipe.but(
        name=f"generic-{learned.steps}-{len(learned.compute)}",
        description="where the bundled model's schedule computes; not learned on your model",
        cache=plan,
    )


def main(paths: list[str]) -> None:
    """Write PATH's schedule under its own name and, for 50 steps, its generic plan."""
    for path in map(Path, paths):
        learned = read_recipe(path).but(name=path.stem)
        recipes = [learned]
        assert isinstance(learned.cache, ScheduleCache)
        if learned.cache.steps == 50:
            recipes.append(generic(learned))
        for recipe in recipes:
            (HOME / f"{recipe.name}.toml").write_text(recipe.to_toml(), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
