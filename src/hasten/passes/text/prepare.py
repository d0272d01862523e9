"""Apply a recipe's `[text]`: weights first, so that no answer of the old ones is kept."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.passes.text.embeddings import cache_embeddings
from hasten.passes.text.weights import store_in_eight_bits
from hasten.recipe import Text
from hasten.step.applied import Applied
from hasten.step.protocols import Pipeline

__all__ = ["prepare_text"]


def prepare_text(pipe: Pipeline, recipe: Text) -> Iterator[Applied]:
    """Apply each part of the section, yielding it as it is done."""
    if recipe.scheme is not None:
        yield store_in_eight_bits(pipe.text_encoder_2, recipe.scheme)
    if recipe.cache_mb:
        yield cache_embeddings(pipe, recipe.cache_mb)
