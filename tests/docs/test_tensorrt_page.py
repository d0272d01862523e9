"""The page about TensorRT: its recipe, code, links and targets."""

from __future__ import annotations

import re
from pathlib import Path

from hasten.engines.tensorrt.targets import FIRST, TARGETS, capability_of
from hasten.recipe import Recipe, resolve

PAGE = Path(__file__).parents[2] / "docs" / "tensorrt.md"
TEXT = PAGE.read_text("utf-8")


def test_its_recipe_is_the_preset_with_a_path() -> None:
    (block,) = re.findall(r"```toml[^\n]*\n(.*?)```", TEXT, re.DOTALL)
    engine = Recipe.from_toml(block).engine
    assert engine is not None
    assert engine.model_copy(update={"path": None}) == resolve("tensorrt-fp8").engine


def test_its_python_is_valid() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        compile(code, str(PAGE), "exec")


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (PAGE.parent / link).exists(), link


def test_its_targets_are_those_there_are() -> None:
    rows = re.findall(r"^\| `(sm\d+)` \| .* \| ([\w, ]+) \|$", TEXT, re.MULTILINE)
    assert dict(rows) == {
        target: ", ".join(name for name, first in FIRST.items() if capability_of(target) >= first)
        for target in TARGETS
    }
