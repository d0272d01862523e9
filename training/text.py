"""The two tokenizers: trained once on every caption, rebuilt from their vocabularies.

T5's is a unigram model, CLIP's a byte-level BPE, as in FLUX.1; both are just large enough for the
captions, and both fall back to single characters or bytes for any other text.
"""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from training.captions import all_captions
from training.vocabulary import COLOURS, things

__all__ = [
    "TEXT_TOKENS",
    "clip_tokenizer",
    "save_tokenizers",
    "t5_tokenizer",
    "train_bpe",
    "train_unigram",
]

TEXT_TOKENS = 32
BPE_MERGES = 900
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
T5_SPECIAL = ["<pad>", "</s>", "<unk>"]
CHARACTERS = string.ascii_letters + string.digits + "-,.'!?&():;/\"" + "ñéèç’"
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def corpus() -> list[str]:
    """Captions for tokenizer training: every thing in every wording, without the repetitions."""
    return [text for text in all_captions(things()) if "background" not in text or "red b" in text]


def train_unigram() -> list[tuple[str, float]]:
    """T5's vocabulary: (piece, log probability), special pieces first.

    The captions hold a few hundred words, so every word is a piece, scored by its frequency; a
    single character costs more than any word and spells out whatever else is typed.
    """
    words = Counter(word for text in corpus() for word in text.replace(",", " ").split())
    words += Counter({colour: 1 for name in COLOURS for colour in (name, name.capitalize())})
    total = sum(words.values())
    pieces = {f"▁{word}": math.log(count / total) for word, count in sorted(words.items())}
    floor = min(pieces.values()) - 4.0
    for character in ("▁", *CHARACTERS):
        pieces.setdefault(character, floor)
    return [*((special, 0.0) for special in T5_SPECIAL), *pieces.items()]


def train_bpe() -> dict[str, Any]:
    """CLIP's vocabulary and merges; all 256 bytes are in it, inside and at the end of a word."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_MERGES, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator((text.lower() for text in corpus()), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, BOS, EOS]))}
    return {"vocab": vocabulary, "merges": [list(pair) for pair in merges]}


def t5_tokenizer(pieces: list[tuple[str, float]]) -> T5TokenizerFast:
    return T5TokenizerFast(
        vocab=[(piece, score) for piece, score in pieces],
        extra_ids=0,
        model_max_length=TEXT_TOKENS,
    )


def clip_tokenizer(bpe: dict[str, Any]) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        model_max_length=TEXT_TOKENS,
    )


def save_tokenizers(pieces: list[tuple[str, float]], bpe: dict[str, Any], folder: Path) -> None:
    """Write `tokenizer/` (CLIP, with the two files older loaders read) and `tokenizer_2/` (T5)."""
    clip_tokenizer(bpe).save_pretrained(folder / "tokenizer")
    t5_tokenizer(pieces).save_pretrained(folder / "tokenizer_2")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]) + "\n"
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(bpe["vocab"]), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text(merges, encoding="utf-8")
