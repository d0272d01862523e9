"""Kept pictures and their scores, against direct arithmetic and the metrics themselves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hasten import quality
from hasten.benchmark.score import save_floats, score, write_png
from hasten.results import Quality

CPU = torch.device("cpu")


def scored(tmp_path: Path, one: torch.Tensor, other: torch.Tensor) -> Quality:
    for name, images in (("a", one), ("b", other)):
        for index, image in enumerate(images):
            save_floats(tmp_path / name, index, image)
    ids = range(len(one))
    folders = (tmp_path / "a", tmp_path / "b")
    return score(*folders, "baseline", ids, device=CPU, progress=lambda *_: None)


def test_scores_are_the_metrics_prompt_by_prompt_over_several_batches(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    one = torch.rand(6, 3, 40, 48, generator=draw)
    other = (one + 0.1 * torch.rand(one.shape, generator=draw)).clamp(0, 1)
    found = scored(tmp_path, one, other)
    assert found.n == 6
    for entry, a, b in zip(found.per_prompt, one, other, strict=True):
        assert entry.psnr == pytest.approx(-10 * math.log10(float(((a - b) ** 2).mean())), abs=1e-3)
        assert entry.ssim == pytest.approx(float(quality.ssim(a[None], b[None])), abs=1e-6)
        assert entry.lpips == pytest.approx(float(quality.lpips(a[None], b[None])), abs=1e-5)
    assert found.lpips == pytest.approx(np.mean([entry.lpips for entry in found.per_prompt]))
    assert found.ms_ssim is None
    assert found.reason == "MS-SSIM requires sides of at least 161 pixels"


def test_equal_pictures_are_perfect(tmp_path: Path) -> None:
    images = torch.rand(1, 3, 176, 176, generator=torch.Generator().manual_seed(0))
    found = scored(tmp_path, images, images)
    assert (found.lpips, found.psnr, found.reason) == (0.0, 100.0, None)
    assert found.ssim == pytest.approx(1, abs=1e-6)
    assert found.ms_ssim == pytest.approx(1, abs=1e-6)


def test_small_pictures_say_what_they_have_no_value_for(tmp_path: Path) -> None:
    images = torch.rand(1, 3, 16, 64, generator=torch.Generator().manual_seed(0))
    found = scored(tmp_path, images, images)
    assert found.lpips is None
    assert found.psnr == 100
    assert found.reason == (
        "LPIPS requires sides of at least 31 pixels; MS-SSIM requires sides of at least 161 pixels"
    )


def test_another_size_is_a_reason_not_a_score(tmp_path: Path) -> None:
    found = scored(tmp_path, torch.zeros(2, 3, 32, 64), torch.zeros(2, 3, 32, 32))
    assert found.n == 0
    assert found.reason == "baseline has 32x32 pixels, this row 64x32"


def test_a_png_rounds_to_the_nearest_of_256(tmp_path: Path) -> None:
    image = torch.tensor([0, 0.4999 / 255, 0.5001 / 255, 1]).expand(3, 2, 4)
    write_png(tmp_path / "deep" / "000.png", image)
    pixels = np.asarray(Image.open(tmp_path / "deep" / "000.png"))
    assert pixels.shape == (2, 4, 3)
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 255]
