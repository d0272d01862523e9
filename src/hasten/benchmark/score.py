"""Stores a row's images in float32 and as PNG, and scores them against a reference row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.atomic import drafted
from hasten.quality import LPIPS_MIN_SIDE, MS_SSIM_MIN_SIDE, lpips, ms_ssim, psnr, ssim
from hasten.results import PromptQuality, Quality, summarize_quality

BATCH = 4
METRICS = {"lpips": lpips, "ssim": ssim, "psnr": psnr, "ms_ssim": ms_ssim}
MIN_SIDE = {"lpips": LPIPS_MIN_SIDE, "ms_ssim": MS_SSIM_MIN_SIDE}

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of finished units and the total."""


def save_floats(folder: Path, prompt: int, image: Tensor) -> None:
    """Store one 3×H×W float image in [0, 1] as float32, for `load_floats`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"image": image.float().cpu().contiguous()}, _float_file(folder, prompt))


def load_floats(folder: Path, prompts: Sequence[int]) -> list[Tensor]:
    """The stored images of these prompt ids, 3×H×W each."""
    return [load_file(_float_file(folder, prompt))["image"] for prompt in prompts]


def write_png(file: Path, image: Tensor) -> None:
    """Write one 3×H×W float image in [0, 1] as an 8-bit PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = image.float().mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    with drafted(file) as draft:
        Image.fromarray(pixels).save(draft, format="PNG")


def score(
    candidates: Path,
    references: Path,
    reference: str,
    prompts: Sequence[int],
    *,
    device: torch.device,
    progress: Progress,
) -> Quality:
    """Score the images that are stored in one folder against those in another.

    A metric is None, with a reason, if the images are too small for it. All metrics are None if the
    images of the two folders differ in size.

    Args:
        candidates: Folder of the row's images.
        references: Folder of the reference row's images.
        reference: Name of the reference row.
        prompts: Ids of the prompts.
        device: Where to compute the metrics.
        progress: Called before each batch and at the end.
    """
    scores: list[PromptQuality] = []
    missing: list[str] = []
    for start in range(0, len(prompts), BATCH):
        progress(f"score against {reference}", start, len(prompts))
        ids = prompts[start : start + BATCH]
        candidate, target = (
            torch.stack(load_floats(folder, ids)).to(device) for folder in (candidates, references)
        )
        if candidate.shape != target.shape:
            reason = f"{reference} has {_size(target)} pixels, this row {_size(candidate)}"
            return summarize_quality(reference, (), reason)
        missing = _too_small(candidate)
        scores += _score_batch(ids, candidate, target)
    progress(f"score against {reference}", len(prompts), len(prompts))
    return summarize_quality(reference, scores, "; ".join(missing) or None)


def _score_batch(ids: Sequence[int], candidate: Tensor, target: Tensor) -> list[PromptQuality]:
    side = min(candidate.shape[-2:])
    nothing = [None] * len(ids)
    with torch.inference_mode():
        values = {
            name: metric(candidate, target).tolist() if side >= MIN_SIDE.get(name, 1) else nothing
            for name, metric in METRICS.items()
        }
    return [
        PromptQuality(id=prompt, **{name: column[index] for name, column in values.items()})
        for index, prompt in enumerate(ids)
    ]


def _too_small(images: Tensor) -> list[str]:
    side = min(images.shape[-2:])
    names = {"lpips": "LPIPS", "ms_ssim": "MS-SSIM"}
    return [
        f"{names[metric]} requires sides of at least {least} pixels"
        for metric, least in MIN_SIDE.items()
        if side < least
    ]


def _float_file(folder: Path, prompt: int) -> Path:
    return folder / f"{prompt:03d}.safetensors"


def _size(images: Tensor) -> str:
    return f"{images.shape[-1]}x{images.shape[-2]}"
