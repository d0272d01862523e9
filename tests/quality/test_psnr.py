from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from hasten.quality import PSNR_CAP_DB, psnr

Picture = Callable[..., Tensor]


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 4),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
)
def test_equals_its_definition_in_double_precision(
    seed: int, n: int, height: int, width: int
) -> None:
    a, b = np.random.RandomState(seed).rand(2, n, 3, height, width).astype(np.float32)
    mse = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    expected = torch.from_numpy(-10 * np.log10(mse)).float()
    torch.testing.assert_close(psnr(torch.from_numpy(a), torch.from_numpy(b)), expected)


@pytest.mark.parametrize("sigma", [0.001, 0.02, 0.3])
def test_equals_torchmetrics(picture: Picture, sigma: float) -> None:
    reference = picture(64, 96, n=3)
    candidate = (reference + sigma * torch.randn_like(reference)).clamp(0, 1)
    expected = peak_signal_noise_ratio(
        candidate, reference, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    torch.testing.assert_close(psnr(candidate, reference), expected)


def test_known_values() -> None:
    reference = torch.full((1, 3, 8, 8), 0.5)
    assert psnr(reference + 0.1, reference).item() == pytest.approx(20, abs=1e-4)
    assert psnr(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)).item() == 0


def test_tiny_differences_are_capped() -> None:
    reference = torch.full((2, 3, 16, 16), 0.5)
    candidate = reference.clone()
    candidate[0, 0, 0, 0] += 1e-5
    assert psnr(candidate, reference).tolist() == [PSNR_CAP_DB, PSNR_CAP_DB]


@given(scale=st.floats(0.05, 1.0))
def test_scaling_the_error_moves_it_by_the_scale_in_decibels(scale: float) -> None:
    reference = torch.full((1, 3, 12, 12), 0.5)
    error = torch.from_numpy(np.random.RandomState(0).uniform(-0.4, 0.4, (1, 3, 12, 12))).float()
    gain = psnr(reference + scale * error, reference) - psnr(reference + error, reference)
    assert gain.item() == pytest.approx(-20 * np.log10(scale), abs=1e-3)
