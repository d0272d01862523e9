"""Figures on pages come from committed results; what is not there is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jinja2
import pytest
from docs.hooks import render
from docs.recipe_keys import reference

from hasten.recipe import Recipe


@pytest.mark.parametrize(
    "page",
    [
        '{{ seconds("tiny-cpu", "nothing") }}',
        '{{ lpips("flux-dev-shape-1024", "cache") }}',
        '{{ value("peers/nothing.json", "rows") }}',
        "{{ nothing }}",
        '{{ seconds("tiny-cpu", "cache") / 2 }}',
    ],
)
def test_a_figure_that_is_not_there_is_an_error(page: str) -> None:
    with pytest.raises((LookupError, OSError, TypeError, ValueError, jinja2.UndefinedError)):
        render(page)


def test_figures_count_as_numbers() -> None:
    one, other = 'seconds("tiny-cpu", "baseline")', 'seconds("tiny-cpu", "cache")'
    shown = render(f"{{{{ {one} }}}} {{{{ {other} }}}} {{{{ ({one} / {other}) | digits(1) }}}}")
    baseline, cache, ratio = map(float, shown.split())
    assert ratio == pytest.approx(baseline / cache, abs=0.06)


def test_every_key_of_a_recipe_is_described() -> None:
    text = reference()
    for section in Recipe.json_schema()["$defs"].values():
        for name, key in section["properties"].items():
            assert key["description"], name
            assert f"| `{name}` |" in text
    assert "None" not in text


def test_every_section_has_its_anchor() -> None:
    assert set(_anchors()) >= {"sampling", "cache", "cache-interval", "quantize", "engine"}


def _anchors() -> Iterator[Any]:
    for line in reference().splitlines():
        if line.startswith("##") and "{ #" in line:
            yield line.partition("{ #")[2].rstrip(" }")
