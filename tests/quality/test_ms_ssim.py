from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from hasten.errors import InputError
from hasten.quality import MS_SSIM_MIN_SIDE, ms_ssim

Picture = Callable[..., Tensor]


def torchmetrics_ms_ssim(candidate: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    values = multiscale_structural_similarity_index_measure(
        candidate.double(), reference.double(), data_range=1.0, reduction="none"
    )
    assert isinstance(values, torch.Tensor)
    return values.float()


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.1, 0.5])
@pytest.mark.parametrize(("height", "width"), [(176, 176), (179, 250), (256, 192)])
def test_equals_torchmetrics_in_double_precision(
    picture: Picture, height: int, width: int, sigma: float
) -> None:
    reference = picture(height, width, n=2)
    candidate = (reference + sigma * torch.randn_like(reference)).clamp(0, 1)
    expected = torchmetrics_ms_ssim(candidate, reference)
    torch.testing.assert_close(ms_ssim(candidate, reference), expected, atol=5e-6, rtol=0)


def test_equals_torchmetrics_on_unrelated_images(picture: Picture) -> None:
    a, b = picture(180, 200, seed=1), torch.rand(1, 3, 180, 200)
    torch.testing.assert_close(ms_ssim(a, b), torchmetrics_ms_ssim(a, b), atol=5e-6, rtol=0)


def test_of_an_image_and_its_negative_is_zero(picture: Picture) -> None:
    image = picture(176, 176)
    assert torchmetrics_ms_ssim(image, 1 - image).item() == 0
    assert ms_ssim(image, 1 - image).item() == 0


def test_opposite_detail_on_equal_ground_is_zero(picture: Picture) -> None:
    ground = 0.3 + 0.4 * picture(180, 180)
    board = 0.3 * ((torch.arange(180)[:, None] + torch.arange(180)) % 2 - 0.5)
    # Only the finest scale's factor is negative; averaged pixels are the ground's.
    assert torchmetrics_ms_ssim(ground + board, ground - board).item() == 0
    assert ms_ssim(ground + board, ground - board).item() == 0


@pytest.mark.parametrize("shape", [(160, 160), (160, 512), (512, 160), (64, 64)])
def test_sides_up_to_160_are_refused(shape: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *shape)
    with pytest.raises(InputError, match="at least 161") as refusal:
        ms_ssim(images, images)
    assert "omit ms_ssim" in refusal.value.fix


def test_the_smallest_side_gives_a_value(picture: Picture) -> None:
    image = picture(MS_SSIM_MIN_SIDE, MS_SSIM_MIN_SIDE)
    assert ms_ssim(image, image).item() == 1
    assert 0 < ms_ssim((image + 0.02 * torch.randn_like(image)).clamp(0, 1), image).item() < 1
