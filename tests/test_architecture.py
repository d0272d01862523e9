"""Imports point one way. Each part may import what its line names, and nothing above it."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hasten
from hasten.step.protocols import PRIVATE_NAMES

SOURCE = Path(hasten.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "presets": set(),
    "process": set(),
    "atomic": set(),
    "sealed": set(),
    "log": set(),
    "progress": set(),
    "results": set(),
    "user_files": {"errors"},
    "recipe": {"errors", "presets", "user_files"},
    "prompts": {"errors", "sealed", "user_files"},
    "memory": {"errors"},
    "machine": {"errors", "memory", "quantization"},
    "results_file": {"errors", "results", "atomic", "sealed", "user_files"},
    "folder_lock": {"errors"},
    "quality": {"errors"},
    "report": {"errors", "results", "results_file", "memory", "atomic"},
    "kernels": {"errors"},
    "quantization": {"errors", "recipe", "kernels"},
    "step": {"errors"},
    "families": {"errors", "kernels", "quantization", "step"},
    "models": {
        "errors", "machine", "memory", "sealed", "user_files", "families", "log",
        "progress",
    },
    "settings": {"errors", "recipe", "machine", "models"},
    "schedules": {"recipe"},
    "passes": {
        "errors", "recipe", "schedules", "step", "kernels", "families", "models", "quantization",
    },
    "conflicts": {"errors", "recipe", "quantization"},
    "check": {
        "errors", "recipe", "machine", "families", "models", "quantization", "conflicts", "step",
        "passes",
    },
    "structural_copy": {"errors"},
    "engines": {
        "errors", "recipe", "machine", "memory", "process", "atomic", "kernels", "step",
        "families", "models", "quantization", "prompts", "log", "structural_copy",
        "check", "sealed", "settings", "user_files",
    },
    "optimization": {"recipe", "families", "models", "passes", "step", "check"},
    "pipeline": {"errors", "recipe", "models", "passes", "step", "settings", "optimization"},
    "apply": {
        "errors", "recipe", "machine", "families", "models", "passes", "engines", "check", "step",
        "structural_copy", "log", "optimization", "pipeline",
    },
    "generation": {
        "", "atomic", "errors", "machine", "memory", "pipeline", "recipe", "settings",
    },
    "calibration": {
        "errors", "recipe", "quality", "kernels", "families", "models", "passes", "quantization",
        "apply", "pipeline", "prompts", "atomic", "sealed", "folder_lock", "check", "settings",
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
    for path in sorted(passes.rglob("*.py")):
        own = ".".join(module_of(path).split(".")[:3])
        others = {
            name
            for name in imports_of(path)
            if name.startswith("hasten.passes.") and not name.startswith(own)
        }
        assert not others, f"{path.name} imports {others}"


def test_one_place_takes_the_forward_of_a_transformer() -> None:
    """And one replaces what pipelines call at their end; everything else is a layer."""
    forward = re.compile(r'transformer\.forward\s*=[^=]|replace_attribute\([^)]*"forward"')
    reset = re.compile(r'"_reset_stateful_cache",|_reset_stateful_cache\s*=[^=]')
    for pattern in (forward, reset):
        found = [
            path.name
            for path in FILES
            for _ in pattern.finditer(path.read_text("utf-8"))
            if path.name != "protocols.py"  # which lists the private names relied on
        ]
        assert found == ["chain.py"], pattern.pattern


def test_packages_import_each_other_in_one_direction() -> None:
    """No circle among the parts, the package's own lazy names aside."""
    after: dict[str, set[str]] = {}
    for path in FILES:
        part = part_of(module_of(path))
        names = {part_of(name) for name in imports_of(path)} & set(MAY_IMPORT)
        after.setdefault(part, set()).update(names - {part, ""})
    graphlib.TopologicalSorter({part: names for part, names in after.items() if part}).prepare()


def test_the_private_names_relied_on_exist() -> None:
    from pydoc import locate

    for owner, names in PRIVATE_NAMES.items():
        found = locate(owner)
        assert found is not None, owner
        here = found() if owner.endswith("AttnProcessor") else found  # set in its constructor
        assert [name for name in names if not hasattr(here, name)] == [], owner


@pytest.mark.parametrize("package", ["step", "passes", "families"])
def test_parameters_have_types_of_their_own(package: str) -> None:
    """Bare `Any` on at most one in twenty."""
    bare = every = 0
    for path in (SOURCE / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                of_all = [*given.posonlyargs, *given.args, *given.kwonlyargs]
                of_all += [one for one in (given.vararg, given.kwarg) if one is not None]
                typed = [one.annotation for one in of_all if one.annotation is not None]
                every += len(typed)
                bare += sum(ast.unparse(one) == "Any" for one in typed)
    assert bare <= every / 20


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


def test_importing_hasten_loads_only_a_few_modules_of_the_standard_library() -> None:
    code = "import sys; had = set(sys.modules); import hasten; print(*(set(sys.modules) - had))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"hasten"}
    assert len(done.stdout.split()) < 60


def test_public_names_exist_and_are_listed() -> None:
    assert set(hasten.__all__) == set(hasten._HOME)
    for name in hasten.__all__:
        assert getattr(hasten, name) is not None
    assert hasten.optimize.__module__ == "hasten.apply"
