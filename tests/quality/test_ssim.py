from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from hasten.quality import ssim

Picture = Callable[..., Tensor]


def torchmetrics_ssim(candidate: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    values = structural_similarity_index_measure(
        candidate.double(), reference.double(), data_range=1.0, reduction="none"
    )
    assert isinstance(values, torch.Tensor)
    return values.float()


@pytest.mark.parametrize("sigma", [0.0, 0.003, 0.05, 0.4])
@pytest.mark.parametrize(("height", "width"), [(11, 11), (11, 40), (64, 64), (97, 130)])
def test_equals_torchmetrics_in_double_precision(
    picture: Picture, height: int, width: int, sigma: float
) -> None:
    reference = picture(height, width, n=3)
    candidate = (reference + sigma * torch.randn_like(reference)).clamp(0, 1)
    expected = torchmetrics_ssim(candidate, reference)
    torch.testing.assert_close(ssim(candidate, reference), expected, atol=2e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), height=st.integers(11, 40), width=st.integers(11, 40))
def test_equals_torchmetrics_on_random_pixels(seed: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 2, 3, height, width, generator=generator)
    torch.testing.assert_close(ssim(a, b), torchmetrics_ssim(a, b), atol=2e-6, rtol=0)


@settings(deadline=None)
@given(a=st.floats(0, 1, width=32), b=st.floats(0, 1, width=32))
def test_of_two_flat_images_is_the_luminance_factor(a: float, b: float) -> None:
    first, second = torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b)
    expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    # Rounding leaves flat variances about 1e-7 off 0, next to a constant of 9e-4.
    assert ssim(first, second).item() == pytest.approx(expected, abs=1e-3)


def test_of_an_image_and_its_negative_is_negative() -> None:
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2).float().expand(1, 3, 32, 32)
    assert -1 <= ssim(board, 1 - board).item() < -0.9


def test_mirroring_both_images_changes_nothing(picture: Picture) -> None:
    a, b = picture(40, 56, seed=1), picture(40, 56, seed=2)
    torch.testing.assert_close(ssim(a.flip(-1), b.flip(-1)), ssim(a, b), atol=1e-6, rtol=0)
    torch.testing.assert_close(ssim(a.mT, b.mT), ssim(a, b), atol=1e-6, rtol=0)
