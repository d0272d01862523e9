"""Metrics that are computed directly from pixels: PSNR, SSIM and MS-SSIM.

SSIM: Wang et al. 2004, doi:10.1109/TIP.2003.819861. MS-SSIM: Wang, Simoncelli and Bovik 2003.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.quality.images import checked_pair

WINDOW = 11
SIGMA = 1.5
MARGIN = WINDOW // 2
"""Number of pixels at each border whose window extends beyond the image."""

# (k·L)² for data range L = 1, equations 7 and 8.
_C1 = 0.01**2
_C2 = 0.03**2


def ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of N image pairs. Higher is closer.

    With the conventions of torchmetrics: a Gaussian window of 11 pixels with sigma 1.5, k1 = 0.01,
    k2 = 0.03, data range 1, images reflected at the border, and the mean over channels and pixels.

    Args:
        candidate: N×3×H×W, float, in [0, 1], with sides of at least 11 pixels.
        reference: The same shape, on the same device.

    Returns:
        N float32 values in [-1, 1] on the images' device; 1 for identical images.

    Raises:
        InputError: The shape, range or dtype is wrong, or the batches differ in shape or device.
    """
    candidate, reference = checked_pair(candidate, reference, "ssim", WINDOW)
    # One pair at a time limits memory and makes each value independent of its batch.
    pairs = zip(candidate, reference, strict=True)
    return torch.stack([similarity_maps(a, b)[0].mean() for a, b in pairs])


def similarity_maps(candidate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM (equation 13) and its contrast-structure factor per pixel of one pair, each C×H×W."""
    moments = torch.stack((candidate, reference, candidate**2, reference**2, candidate * reference))
    mean_a, mean_b, square_a, square_b, product = _blurred(moments)
    # Variances are not clamped at 0. Rounding makes them -1e-7 at worst, which is far less than
    # C2, and without clamping both sides of each fraction are equal for identical images.
    variances = (square_a - mean_a**2) + (square_b - mean_b**2)
    covariance = product - mean_a * mean_b
    contrast = (2 * covariance + _C2) / (variances + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return luminance * contrast, contrast


def _blurred(maps: Tensor) -> Tensor:
    """Gaussian blur of ...×C×H×W maps, reflected at the border.

    Uses shifted sums instead of a convolution, because GPUs may run convolutions in TF32, whose
    10-bit mantissa is too short for a variance, a small difference of large numbers.
    """
    padded = F.pad(maps, (MARGIN, MARGIN, MARGIN, MARGIN), mode="reflect")
    return _blurred_along(_blurred_along(padded, -1), -2)


def _blurred_along(padded: Tensor, dim: int) -> Tensor:
    """The valid part of a one-dimensional blur: `WINDOW` - 1 shorter along `dim`."""
    bell = [math.exp(-((i - MARGIN) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    side = padded.shape[dim] - WINDOW + 1
    blurred = torch.zeros_like(padded.narrow(dim, 0, side))
    for i, weight in enumerate(bell):
        blurred.add_(padded.narrow(dim, i, side), alpha=weight / sum(bell))
    return blurred


PSNR_CAP_DB = 100.0
"""PSNR of identical images, in dB. Infinity is not valid JSON and makes means useless."""


def psnr(candidate: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of N image pairs, 10·log10(1 / MSE). Higher is closer.

    The mean squared error is over all channels and pixels of a pair.

    Args:
        candidate: N×3×H×W, float, in [0, 1].
        reference: The same shape, on the same device.

    Returns:
        N float32 values in dB on the images' device, at most 100.

    Raises:
        InputError: The shape, range or dtype is wrong, or the batches differ in shape or device.
    """
    candidate, reference = checked_pair(candidate, reference, "psnr")
    mse = (candidate - reference).square().mean(dim=(1, 2, 3))
    return (10 * (1 / mse).log10()).clamp_max(PSNR_CAP_DB)


MS_SSIM_MIN_SIDE = 161
"""The smallest side, in pixels, that has at least the window's 11 pixels after four halvings."""

# Exponents of the five scales, finest first (section 3.2 of the paper).
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """Multi-scale structural similarity of N image pairs. Higher is closer.

    The product of the contrast-structure factors of SSIM at the first four of five scales, each
    half the size of the one before, and of SSIM at the coarsest. Each factor is raised to the
    power of the paper's weight, negative factors count as 0: the conventions of torchmetrics.

    Args:
        candidate: N×3×H×W, float, in [0, 1], with sides of at least `MS_SSIM_MIN_SIDE` pixels.
        reference: The same shape, on the same device.

    Returns:
        N float32 values in [0, 1] on the images' device; 1 for identical images.

    Raises:
        InputError: A side is too small, the shape, range or dtype is wrong, or the batches differ
            in shape or device.
    """
    candidate, reference = checked_pair(candidate, reference, "ms_ssim", MS_SSIM_MIN_SIDE)
    return torch.stack([_one_pair(a, b) for a, b in zip(candidate, reference, strict=True)])


def _one_pair(candidate: Tensor, reference: Tensor) -> Tensor:
    value = torch.ones((), dtype=candidate.dtype, device=candidate.device)
    for weight in _WEIGHTS[:-1]:
        _, contrast = similarity_maps(candidate, reference)
        # Only windows that are completely inside the image count, except at the coarsest scale.
        inner = contrast[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
        value = value * inner.mean().relu() ** weight
        candidate = F.avg_pool2d(candidate, 2)
        reference = F.avg_pool2d(reference, 2)
    similarity, _ = similarity_maps(candidate, reference)
    return value * similarity.mean().relu() ** _WEIGHTS[-1]
