"""The pack on a device: pictures as one tensor, triples as index rows, and composites of them.

A composite is a picture scaled and shifted a little over a flat background colour.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from training.models import SIZE
from training.vocabulary import COLOURS, STYLES, held_out, things

__all__ = ["Pack", "composite", "load_pack", "sample_composites", "triples"]

SCALE = (0.86, 1.0)  # of the packed picture, which is smaller than the canvas
SHIFT_PIXELS = 5.0
COLOUR_JITTER = 6.0 / 255


@dataclass(frozen=True)
class Pack:
    """`pictures`: P×4×S×S uint8 straight RGBA; rows 2·i + style are thing i's, then the extras."""

    pictures: Tensor
    roles: tuple[str, ...]
    things: int
    unigram: list[tuple[str, float]]
    bpe: dict[str, Any]

    def rows(self, *roles: str) -> Tensor:
        """Indices of the pictures in any of `roles`."""
        found = [i for i, role in enumerate(self.roles) if role in roles]
        return torch.tensor(found, device=self.pictures.device)


def load_pack(path: Path, device: torch.device, *, limit: int | None = None) -> Pack:
    """Read the pack; `limit` keeps only the first things (and as many others), for tests."""
    with zipfile.ZipFile(path) as pack:
        index = json.loads(pack.read("index.json"))
        unigram = [(piece, score) for piece, score in json.loads(pack.read("unigram.json"))]
        bpe = json.loads(pack.read("bpe.json"))
        entries = list(enumerate(index["pictures"]))
        if limit is not None:
            by_role = {role: [e for e in entries if e[1]["role"] == role] for role in ROLES}
            entries = [entry for role in ROLES for entry in by_role[role][: 2 * limit]]
        arrays = [
            np.asarray(Image.open(io.BytesIO(pack.read(f"{number:04d}.png"))).convert("RGBA"))
            for number, _ in entries
        ]
    roles = tuple(entry["role"] for _, entry in entries)
    labels = [entry["label"] for _, entry in entries if entry["role"] == "vocabulary"]
    expected = [thing.label for thing in things()[: len(labels) // 2] for _ in STYLES]
    if labels != expected:
        raise ValueError(f"{path} was packed from another vocabulary: run training.prepare again")
    pictures = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(device)
    return Pack(pictures, roles, len(labels) // 2, unigram, bpe)


ROLES = ("vocabulary", "extra", "unseen")


def triples(count: int, *, seen: bool, device: torch.device) -> Tensor:
    """M×3 rows (thing, style, colour) over the first `count` things: trained on, or held out."""
    rows = [
        (i, s, c)
        for i, thing in enumerate(things()[:count])
        for s, style in enumerate(STYLES)
        for c, colour in enumerate(COLOURS)
        if held_out(thing.label, style.name, colour) != seen
    ]
    return torch.tensor(rows, device=device)


def palette(device: torch.device) -> Tensor:
    """12×3 background colours in [0, 1]."""
    return torch.tensor(list(COLOURS.values()), device=device, dtype=torch.float32) / 255


def composite(pictures: Tensor, backgrounds: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """B×4×S×S uint8 pictures over B×3 colours -> B×3×128×128 in [0, 1].

    `scale` (B) is relative to the packed size, `shift` (B×2) is (right, down) in canvas pixels.
    """
    rgba = pictures.float() / 255
    alpha = rgba[:, 3:]
    premultiplied = torch.cat([rgba[:, :3] * alpha, alpha], dim=1)
    zoom = SIZE / (pictures.shape[-1] * scale)
    theta = torch.zeros(len(scale), 2, 3, device=pictures.device)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = -shift * (2 / SIZE) * zoom[:, None]
    grid = F.affine_grid(theta, [len(scale), 4, SIZE, SIZE], align_corners=False)
    placed = F.grid_sample(premultiplied, grid, align_corners=False, padding_mode="zeros")
    return placed[:, :3] + backgrounds[:, :, None, None] * (1 - placed[:, 3:])


def sample_composites(
    pack: Pack, picture_rows: Tensor, colours: Tensor, generator: torch.Generator
) -> Tensor:
    """Fresh composites of these pictures on these colour indices, each with its own jitter."""
    count, device = len(picture_rows), pack.pictures.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * uniform(count)
    shift = SHIFT_PIXELS * (2 * uniform(count, 2) - 1)
    backgrounds = palette(device)[colours] + COLOUR_JITTER * (2 * uniform(count, 3) - 1)
    return composite(pack.pictures[picture_rows], backgrounds.clamp(0, 1), scale, shift)
