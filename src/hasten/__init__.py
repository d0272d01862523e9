"""Make diffusion-transformer pipelines fast, and say what the speed cost in quality.

Importing this module imports no torch: each name is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten import quality
    from hasten.apply import optimize
    from hasten.benchmark import bench
    from hasten.calibration.activations import calibrate_activations
    from hasten.calibration.learn import calibrate
    from hasten.errors import (
        AlreadyOptimizedError,
        CallError,
        HastenError,
        InputError,
        ModelError,
        RecipeError,
        UnsupportedError,
    )
    from hasten.families import register_family
    from hasten.models import load_pipeline
    from hasten.pipeline import OptimizedPipeline, restore
    from hasten.recipe import Recipe

__version__ = "0.1.0"

_HOME = {
    "AlreadyOptimizedError": "hasten.errors",
    "CallError": "hasten.errors",
    "HastenError": "hasten.errors",
    "InputError": "hasten.errors",
    "ModelError": "hasten.errors",
    "OptimizedPipeline": "hasten.pipeline",
    "Recipe": "hasten.recipe",
    "RecipeError": "hasten.errors",
    "UnsupportedError": "hasten.errors",
    "bench": "hasten.benchmark",
    "calibrate": "hasten.calibration.learn",
    "calibrate_activations": "hasten.calibration.activations",
    "load_pipeline": "hasten.models",
    "optimize": "hasten.apply",
    "quality": "hasten.quality",
    "register_family": "hasten.families",
    "restore": "hasten.pipeline",
}

__all__ = [
    "AlreadyOptimizedError",
    "CallError",
    "HastenError",
    "InputError",
    "ModelError",
    "OptimizedPipeline",
    "Recipe",
    "RecipeError",
    "UnsupportedError",
    "bench",
    "calibrate",
    "calibrate_activations",
    "load_pipeline",
    "optimize",
    "quality",
    "register_family",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    module = import_module(_HOME[name])
    return module if _HOME[name] == f"hasten.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
