"""hasten under any recipe: a preset's name or the path of a .toml file."""

from __future__ import annotations

from typing import Any

from studies.peers.rows.applied import Applied
from studies.peers.workload import Workload

import hasten
from hasten.recipe import resolve

__all__ = ["optimized"]


def optimized(pipe: Any, name: str, _: Workload) -> Applied:
    """`[text]` is left out (embeddings are given), and so is what `[sampling]` says."""
    recipe = resolve(name).but(text=None, sampling=None)
    fast = hasten.optimize(pipe, recipe)
    return Applied(
        fast,
        lambda: fast.last_run.computed,
        {"hasten.optimize": recipe.to_toml()},
        summary=fast.summary,
    )
