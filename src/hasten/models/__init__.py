"""Loading of models. Torch is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.models.load import has_random_weights, load_pipeline

__all__ = ["has_random_weights", "load_pipeline"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hasten.models' has no attribute {name!r}")
    from hasten.models import load

    return getattr(load, name)
