"""The shipped prompt set and the evaluation set."""

from __future__ import annotations

from itertools import pairwise

from training.prompts import (
    CALIBRATION,
    CALIBRATION_HEADER,
    HEADER,
    TINY,
    calibration_prompts,
    evaluation_triples,
    tiny_prompts,
    tiny_triples,
)
from training.vocabulary import COLOURS, held_out, things


def test_the_file_is_what_the_function_gives() -> None:
    assert TINY.read_text(encoding="utf-8") == HEADER + "\n".join(tiny_prompts()) + "\n"
    assert len(tiny_prompts()) >= 320


def test_the_calibration_set_is_what_the_function_gives() -> None:
    prompts = calibration_prompts()
    assert CALIBRATION.read_text(encoding="utf-8") == CALIBRATION_HEADER + "\n".join(prompts) + "\n"
    for learned in (prompts[:16], prompts[16:24]):  # of the defaults: learned on, held back
        assert len({prompt.split(" background")[0].split()[-1] for prompt in learned}) >= 7
        assert {prompt.split(" of ")[0] for prompt in learned} == {
            "a 3D render",
            "a flat drawing",
        }


def test_the_first_lines_are_varied() -> None:
    first = tiny_triples()[:48]
    assert len({thing.label for thing, _, _ in first}) == 48
    for colour in COLOURS:
        assert {style.name for _, style, c in first if c == colour} == {"3d", "flat"}
    neighbours = pairwise(first)
    assert all(a[1] != b[1] and a[2] != b[2] for a, b in neighbours)


def test_evaluation_asks_for_seen_and_for_held_out_triples() -> None:
    for seen in (True, False):
        chosen = evaluation_triples(things(), seen=seen)
        assert len(chosen) > 0.95 * len(things())
        assert {held_out(t.label, s.name, c) for t, s, c in chosen} == {not seen}
