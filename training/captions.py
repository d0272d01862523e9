"""Captions: all textual descriptions of an image.

A caption is style × thing × background colour, in one of `VARIANTS` wordings. Variant 0 is the
plain wording the prompts use; the others change the name, the style phrase or the background
phrase. Style or colour `None` leaves that part out.
"""

from __future__ import annotations

from collections.abc import Iterator

from training.vocabulary import COLOURS, STYLES, Style, Thing, with_article

__all__ = ["VARIANTS", "all_captions", "caption"]

VARIANTS = 6
BACKGROUNDS = (" on {} background", ", {} background", " in front of {} background")


def background(colour: str, variant: int) -> str:
    phrase = BACKGROUNDS[variant % len(BACKGROUNDS)]
    return phrase.format(colour if phrase.startswith(",") else with_article(colour))


def caption(thing: Thing, style: Style | None, colour: str | None, variant: int = 0) -> str:
    """The caption of a picture of `thing`, such as "a 3D render of a fox on a red background".

    Variants 0 to 2 name the thing by its first name; later ones use its other names, if any. The
    last variant is capitalised, as people type.
    """
    names = thing.names
    text = names[0] if variant < 3 else names[variant % len(names)]
    if style is not None:
        # Half of all wordings keep the usual phrase.
        phrase = 0 if variant in (0, 3, 5) else 1 + variant % 2
        text = style.phrases[phrase].format(text)
    if colour is not None:
        text += background(colour, 0 if variant in (0, 3, 5) else variant)
    return text[0].upper() + text[1:] if variant == VARIANTS - 1 else text


def all_captions(vocabulary: tuple[Thing, ...]) -> Iterator[str]:
    """Every caption, ordered thing × (styles, none) × (colours, none) × variant."""
    for thing in vocabulary:
        for style in (*STYLES, None):
            for colour in (*COLOURS, None):
                for variant in range(VARIANTS):
                    yield caption(thing, style, colour, variant)
