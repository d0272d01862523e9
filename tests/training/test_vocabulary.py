"""Things, captions and the hold-out law."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training.captions import VARIANTS, all_captions, caption
from training.data import triples
from training.vocabulary import COLOURS, HOLD_OUT, STYLES, held_out, things

THINGS = st.sampled_from(things())
STYLE = st.sampled_from(STYLES)
COLOUR = st.sampled_from(list(COLOURS))


def test_names_are_distinct_and_do_not_hide_a_style_or_a_background() -> None:
    names = [name for thing in things() for name in thing.names]
    assert len(names) == len(set(names))
    assert len({thing.label for thing in things()}) == len(things()) >= 300
    assert not [name for name in names if "background" in name or "3D" in name or "flat" in name]


def test_articles() -> None:
    by_label = {thing.label: thing for thing in things()}
    style = STYLES[0]
    assert caption(by_label["owl"], style, "orange") == (
        "a 3D render of an owl on an orange background"
    )
    assert caption(by_label["grapes"], STYLES[1], "red") == (
        "a flat drawing of grapes on a red background"
    )


@given(THINGS, STYLE, COLOUR, st.integers(0, VARIANTS - 1))
def test_every_wording_names_the_thing_and_the_background(thing, style, colour, variant) -> None:
    text = caption(thing, style, colour, variant).lower()
    assert any(name.lower() in text for name in thing.names)
    assert f"{colour} background" in text
    assert "flat" in text if style.name == "flat" else "3d" in text


@given(THINGS, st.integers(0, VARIANTS - 1))
def test_parts_can_be_left_out(thing, variant) -> None:
    assert "background" not in caption(thing, STYLES[0], None, variant)
    assert "3D" not in caption(thing, None, "red", variant)


def test_wordings_of_one_triple_differ() -> None:
    dog = next(thing for thing in things() if thing.label == "dog face")
    wordings = {caption(dog, STYLES[0], "red", variant) for variant in range(VARIANTS)}
    assert len(wordings) >= 4
    assert next(iter(all_captions((dog,)))) == "a 3D render of a dog on a red background"


@settings(deadline=None, max_examples=10)
@given(count=st.integers(1, len(things())))
def test_held_out_triples_never_reach_a_sampler(count) -> None:
    """Every sampler draws rows of `triples(seen=True)`: none is held out, and none is missing."""
    device = torch.device("cpu")
    seen = {tuple(row) for row in triples(count, seen=True, device=device).tolist()}
    unseen = {tuple(row) for row in triples(count, seen=False, device=device).tolist()}
    assert not seen & unseen
    assert len(seen) + len(unseen) == count * len(STYLES) * len(COLOURS)
    names = list(COLOURS)
    for i, s, c in unseen:
        assert held_out(things()[i].label, STYLES[s].name, names[c])
    for i, s, c in seen:
        assert not held_out(things()[i].label, STYLES[s].name, names[c])


def test_the_held_out_share() -> None:
    device = torch.device("cpu")
    unseen = len(triples(len(things()), seen=False, device=device))
    assert abs(unseen / (len(things()) * 24) - HOLD_OUT) < 0.01
