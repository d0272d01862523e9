"""Plans and stores without looking at the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.benchmark.plan import Plan
from hasten.benchmark.rows import plan_rows
from hasten.benchmark.workload import Options, resolve_workload
from hasten.errors import Faults
from hasten.recipe import Recipe
from hasten.results import Environment

FAKE = "tests.benchmark.fake_engine"
ENVIRONMENT = Environment(
    device="cpu", torch="2", diffusers="1", hasten="0", date="2026-01-02T03:04:05+00:00"
)


def make_plan(
    recipes: Sequence[Recipe], *, references: Sequence[str] = ("baseline",), **options: Any
) -> Plan:
    """A plan on the CPU; by default 2 prompts of 48x32 pixels in 6 steps."""
    given = {
        "model": "owner/name",
        "limit": 2,
        "size": "48x32",
        "steps": 6,
        "prompts": "general",
        **options,
    }
    faults = Faults()
    workload = resolve_workload(Options(dtype="float32", **given), faults)
    rows = plan_rows(recipes, workload.steps, references, faults)
    faults.raise_any()
    return Plan(workload, ENVIRONMENT, "cpu", rows, tuple(references))


def odd(description: str) -> Recipe:
    """A recipe whose description tells the fake engine how to go wrong."""
    return Recipe(name=description.replace(" ", "-"), description=description)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
