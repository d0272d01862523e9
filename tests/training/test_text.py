"""The tokenizers: nothing is unknown, nothing is lost, every caption fits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training.captions import all_captions
from training.text import (
    CHARACTERS,
    TEXT_TOKENS,
    clip_tokenizer,
    t5_tokenizer,
    train_bpe,
    train_unigram,
)
from training.vocabulary import things

SAMPLE = random.Random(0).sample(list(all_captions(things())), 300)


@pytest.fixture(scope="module")
def t5():
    return t5_tokenizer(train_unigram())


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer(train_bpe())


def test_t5_gives_the_caption_back(t5) -> None:
    for text in SAMPLE:
        ids = t5(text).input_ids
        assert len(ids) < TEXT_TOKENS
        assert t5.unk_token_id not in ids
        assert t5.decode(ids, skip_special_tokens=True) == text


def test_t5_has_one_piece_a_word(t5) -> None:
    assert t5.tokenize("a 3D render of an owl on a teal background") == [
        *("▁a", "▁3D", "▁render", "▁of", "▁an", "▁owl", "▁on", "▁a", "▁teal", "▁background")
    ]


@given(text=st.text(CHARACTERS + " ", max_size=20))
def test_t5_spells_any_word_it_does_not_know(t5, text) -> None:
    ids = t5(text).input_ids
    assert t5.unk_token_id not in ids
    assert t5.decode(ids, skip_special_tokens=True).split() == text.split()


@given(text=st.text(min_size=1, max_size=12))
def test_clip_has_every_byte(clip, text) -> None:
    assert clip.unk_token_id not in clip(text).input_ids[1:-1]


def test_clip_captions_fit_and_keep_their_letters(clip) -> None:
    for text in SAMPLE:
        ids = clip(text).input_ids
        assert len(ids) <= TEXT_TOKENS
        decoded = clip.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")
