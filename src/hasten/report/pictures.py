"""Pictures for a file that stands alone: as good as fits, each link leading to the PNG itself."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from hasten.results import Results

# Base64 adds a third, so this many bytes keep the page under 15 MB.
BUDGET_BYTES = 10_500_000
SAMPLE = 8

# Best first. Under quality 80 differences between recipes would drown in those of the encoder:
# the page then grows instead.
ENCODINGS: list[tuple[str, dict[str, Any]]] = [
    ("lossless WebP", {"lossless": True, "quality": 60}),
    *((f"WebP, quality {quality}", {"quality": quality}) for quality in (95, 90, 85, 80)),
]


Key = tuple[str, int]  # recipe, place among the prompts


@dataclass(frozen=True)
class AlbumPicture:
    """`uri` is the embedded copy, empty where the same pixels are embedded already for the same
    prompt, under the recipe `same_as`. `link` leads from the report to the file on disk."""

    link: str
    uri: str = ""
    same_as: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Album:
    """The pictures by recipe and place among the prompts, and how they are embedded."""

    encoding: str
    pictures: dict[Key, AlbumPicture] = field(default_factory=dict)


def collect(results: Results, images_dir: Path, out_dir: Path) -> Album:
    """Read every PNG that `results` names under `images_dir`; one that cannot be read becomes a
    `problem` in its place."""
    paths = {
        (row.recipe, index): images_dir / image
        for row in results.rows
        for index, image in enumerate(row.images)
    }
    # Decoding and encoding leave Python's lock, so threads share the work out.
    with ThreadPoolExecutor() as pool:
        fingerprints = dict(zip(paths, pool.map(_fingerprint, paths.values()), strict=True))
        first = _first_of_its_pixels(fingerprints)
        originals = {key: paths[key] for key in paths if first.get(key) == key[0]}
        encoding, encoded = _encode_within_budget(originals, pool)
    pictures = {}
    for key, path in paths.items():
        link = quote(Path(os.path.relpath(path, out_dir)).as_posix())
        if key in encoded:
            pictures[key] = AlbumPicture(link, uri=_data_uri(encoded[key]))
        elif key in first:
            pictures[key] = AlbumPicture(link, same_as=first[key])
        else:
            pictures[key] = AlbumPicture(link, problem=f"{path.name} is missing or cannot be read")
    return Album(encoding, pictures)


def _first_of_its_pixels(fingerprints: dict[Key, str | None]) -> dict[Key, str]:
    """For each readable picture the first recipe with the same pixels for the same prompt."""
    seen: dict[tuple[int, str], str] = {}
    return {
        (recipe, index): seen.setdefault((index, fingerprint), recipe)
        for (recipe, index), fingerprint in fingerprints.items()
        if fingerprint
    }


def _fingerprint(path: Path) -> str | None:
    try:
        if not path.is_file():  # a pipe or a device would never end
            return None
        image = _open(path)
    except Exception:  # decoders raise errors of any kind on a damaged file
        return None
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _encode_within_budget(
    paths: dict[Key, Path], pool: ThreadPoolExecutor
) -> tuple[str, dict[Key, bytes]]:
    """The best encoding whose total fits, foretold from a few pictures and then checked on all."""
    if not paths:
        return "no pictures", {}
    sample = list(paths.values())[:: -(-len(paths) // SAMPLE)]
    for name, options in ENCODINGS:
        last = name == ENCODINGS[-1][0]
        encode = partial(_encode, options=options)
        foretold = sum(len(data) for data, _ in pool.map(encode, sample)) / len(sample)
        if foretold * len(paths) > BUDGET_BYTES and not last:
            continue
        copies = dict(zip(paths, pool.map(encode, paths.values()), strict=True))
        if last or sum(len(data) for data, _ in copies.values()) <= BUDGET_BYTES:
            break
    # Readers who judge fine differences must know those that the page itself brings.
    worst = min(fidelity for _, fidelity in copies.values())
    quality = "" if math.isinf(worst) else f", the furthest copy {worst:.1f} dB from its PNG"
    return name + quality, {key: data for key, (data, _) in copies.items()}


def _encode(path: Path, options: dict[str, Any]) -> tuple[bytes, float]:
    """The encoded picture, and its PSNR in dB against the file: infinite where it is lossless."""
    image, buffer = _open(path), io.BytesIO()
    image.save(buffer, "WEBP", method=4, **options)
    data = buffer.getvalue()
    with Image.open(buffer) as copy:
        error = np.asarray(copy.convert("RGB"), np.float32) - np.asarray(image, np.float32)
    mean_square = float(np.mean(error**2))
    return data, 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def _data_uri(data: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(data).decode('ascii')}"
