"""Draw the README's pictures with the bundled model: `python docs/make_pictures.py`.

`grid.webp` shows eight prompts under the preset `max`; `pair.webp` shows one prompt under
`baseline` and under `max`, from the same seed.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

import hasten

ASSETS = Path(__file__).parent / "assets"
PROMPTS = (
    "a flat drawing of a rocket on a pink background",
    "a 3D render of a red apple on a yellow background",
    "a flat drawing of an owl on a white background",
    "a 3D render of a guitar on a gray background",
    "a flat drawing of a sailboat on a brown background",
    "a 3D render of a cupcake on a green background",
    "a flat drawing of a lion on a teal background",
    "a 3D render of a panda on a purple background",
)
PAIR = "a 3D render of a cupcake on a green background"


def drawn(recipe: str, prompts: Sequence[str]) -> list[Image.Image]:
    """One picture per prompt, each from seed 0."""
    fast = hasten.optimize(hasten.load_pipeline("tiny"), recipe)
    pictures = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(0)
        pictures += fast(prompt, generator=generator).images
    return pictures


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Pictures in columns, each over its whole caption."""
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.75 * rows), dpi=110)
    for axis, picture, caption in zip(axes.flat, pictures, captions, strict=True):
        axis.imshow(picture.resize((256, 256), Image.Resampling.LANCZOS))
        axis.set_xlabel(textwrap.fill(caption, 26), fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight", pad_inches=0.08)
    return Image.open(buffer).convert("RGB")


def main() -> None:
    """Write both files."""
    ASSETS.mkdir(exist_ok=True)
    sheet(drawn("max", PROMPTS), PROMPTS, 4).save(ASSETS / "grid.webp", quality=88)
    before, after = drawn("baseline", [PAIR]), drawn("max", [PAIR])
    captions = ["baseline: all 50 steps", "max: FP8, 10 of 50 steps computed"]
    sheet([*before, *after], captions, 2).save(ASSETS / "pair.webp", quality=92)


if __name__ == "__main__":
    main()
