"""Imports point one way. Each part may import what its line names, and nothing above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hasten

SOURCE = Path(hasten.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "presets": set(),
    "user_files": {"errors"},
    "recipe": {"errors", "user_files"},
    "results": set(),
    "prompts": {"errors", "sealed", "user_files"},
    "memory": {"errors"},
    "machine": {"errors", "memory"},
    "process": set(),
    "atomic": set(),
    "sealed": set(),
    "units": set(),
    "library_logging": set(),
    "log": set(),
    "results_file": {"errors", "results", "atomic", "sealed"},
    "folder_lock": {"errors"},
    "quality": {"errors"},
    "report": {"errors", "results", "results_file", "units", "atomic"},
    "kernels": {"errors"},
    "quantization": {"errors", "recipe", "machine", "kernels"},
    "families": {"errors", "kernels", "quantization", "step"},
    "models": {
        "errors", "machine", "memory", "sealed", "units", "user_files", "families",
        "library_logging",
    },
    "settings": {"errors", "recipe", "machine", "models"},
    "schedules": {"recipe"},
    "step": {"errors"},
    "passes": {
        "errors", "recipe", "schedules", "step", "kernels", "families", "models", "quantization",
    },
    "engines": {
        "errors", "recipe", "machine", "memory", "process", "units", "atomic", "kernels",
        "families", "models", "quantization", "prompts", "library_logging", "structural_copy",
        "check", "sealed", "settings", "user_files",
    },
    "structural_copy": {"errors"},
    "conflicts": {"recipe", "machine"},
    "check": {"errors", "recipe", "machine", "families", "models", "quantization", "conflicts"},
    "pipeline": {"errors", "recipe", "models", "passes", "check", "step"},
    "apply": {
        "errors", "recipe", "machine", "families", "models", "passes", "engines", "check",
        "conflicts", "structural_copy", "log", "pipeline",
    },
    "generation": {
        "", "atomic", "errors", "machine", "memory", "pipeline", "recipe", "settings",
    },
    "calibration": {
        "errors", "recipe", "quality", "kernels", "families", "models", "passes", "quantization",
        "apply", "pipeline", "prompts", "atomic", "sealed", "folder_lock",
    },
}  # fmt: skip
LOWER = set(MAY_IMPORT)
MAY_IMPORT["benchmark"] = LOWER | {""}
MAY_IMPORT["cli"] = LOWER | {"benchmark", ""}
MAY_IMPORT[""] = set(MAY_IMPORT)  # the package itself: lazy names


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> set[str]:
    """hasten modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"hasten.{alias.name}" for alias in node.names}
                if node.module == "hasten"
                else {node.module}
            )
    return {name for name in found if name.split(".")[0] == "hasten"}


def module_of(path: Path) -> str:
    relative = path.relative_to(SOURCE.parent).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(module_of(path))
    names = {part_of(name) for name in imports_of(path)}
    known = names & set(MAY_IMPORT) | ({""} if names - set(MAY_IMPORT) else set())
    assert known - {part} <= MAY_IMPORT[part]


def test_passes_do_not_import_each_other() -> None:
    passes = SOURCE / "passes"
    shared = {"hasten.step.applied"}
    for path in sorted(passes.rglob("*.py")):
        own = ".".join(module_of(path).split(".")[:3])
        others = {
            name
            for name in imports_of(path) - shared
            if name.startswith("hasten.passes.") and not name.startswith(own)
        }
        assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize(
    "module",
    [
        "hasten",
        "hasten.benchmark",
        "hasten.cli",
        "hasten.recipe",
        "hasten.report",
        "hasten.settings",
    ],
)
def test_what_must_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; assert not {{'torch', 'diffusers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_are_listed() -> None:
    assert set(hasten.__all__) == set(hasten._HOME)
    for name in hasten.__all__:
        assert getattr(hasten, name) is not None
    assert hasten.optimize.__module__ == "hasten.apply"
