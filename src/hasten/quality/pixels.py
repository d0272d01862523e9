"""Metrics that are formulas on pixels: PSNR, SSIM and MS-SSIM.

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
"""How many pixels at each border have a window that reaches outside the image."""

# (k·L)² for data range L = 1, equations 7 and 8.
_C1 = 0.01**2
_C2 = 0.03**2


def ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """SSIM of N image pairs: N float32 values in [-1, 1], 1 for identical images.

    Gaussian window of 11 pixels with sigma 1.5, k1 = 0.01, k2 = 0.03, data range 1, on each
    colour channel, images reflected at the border, mean over channels and all pixels: the
    conventions of torchmetrics. `candidate` and `reference` are N×3×H×W float tensors in [0, 1]
    with sides >= 11; the values lie on their device.

    Raises:
        InputError: wrong shape, range or dtype, or mismatched batches.
    """
    candidate, reference = checked_pair(candidate, reference, "ssim", WINDOW)
    # One pair at a time bounds memory, and no value can depend on the rest of its batch.
    pairs = zip(candidate, reference, strict=True)
    return torch.stack([similarity_maps(a, b)[0].mean() for a, b in pairs])


def similarity_maps(candidate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM (equation 13) and its contrast-structure factor at every pixel of one pair, C×H×W."""
    moments = torch.stack((candidate, reference, candidate**2, reference**2, candidate * reference))
    mean_a, mean_b, square_a, square_b, product = _blurred(moments)
    # Variances are not clamped at 0: rounding leaves them 1e-7 below it at worst, far less than
    # C2, and unclamped the two sides of each fraction are equal when the images are.
    variances = (square_a - mean_a**2) + (square_b - mean_b**2)
    covariance = product - mean_a * mean_b
    contrast = (2 * covariance + _C2) / (variances + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return luminance * contrast, contrast


def _blurred(maps: Tensor) -> Tensor:
    """Gaussian blur of ...×C×H×W maps, reflected at the border.

    Shifted sums rather than a convolution: a GPU may run convolutions in TF32, whose 10-bit
    mantissa swamps the small difference of large numbers that a variance is.
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
"""What identical images score, in dB: an infinity would be no valid JSON and spoil every mean."""


def psnr(candidate: Tensor, reference: Tensor) -> Tensor:
    """PSNR of N image pairs in dB, 10·log10(1 / MSE), capped at 100: N float32 values.

    Higher is closer. `candidate` and `reference` are N×3×H×W float tensors in [0, 1]; the mean
    squared error is over all channels and pixels of one pair. The values lie on their device.

    Raises:
        InputError: wrong shape, range or dtype, or mismatched batches.
    """
    candidate, reference = checked_pair(candidate, reference, "psnr")
    mse = (candidate - reference).square().mean(dim=(1, 2, 3))
    return (10 * (1 / mse).log10()).clamp_max(PSNR_CAP_DB)


MS_SSIM_MIN_SIDE = 161
"""Four halvings of a smaller side leave less than the window of 11 pixels asks for."""

# Exponents of the five scales, finest first (section 3.2 of the paper).
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """MS-SSIM of N image pairs: N float32 values in [0, 1], 1 for identical images.

    The contrast-structure factor of SSIM at five scales, each half the one before, and SSIM
    itself at the coarsest, negative factors taken as 0, each to the power of the paper's weight,
    multiplied: the conventions of torchmetrics. `candidate` and `reference` are N×3×H×W float
    tensors in [0, 1] with sides >= `MS_SSIM_MIN_SIDE`; the values lie on their device.

    Raises:
        InputError: a side of 160 or less, wrong shape, range or dtype, or mismatched batches.
    """
    candidate, reference = checked_pair(candidate, reference, "ms_ssim", MS_SSIM_MIN_SIDE)
    return torch.stack([_one_pair(a, b) for a, b in zip(candidate, reference, strict=True)])


def _one_pair(candidate: Tensor, reference: Tensor) -> Tensor:
    value = torch.ones((), dtype=candidate.dtype, device=candidate.device)
    for weight in _WEIGHTS[:-1]:
        _, contrast = similarity_maps(candidate, reference)
        # Only windows wholly inside the image count, except at the coarsest scale.
        inner = contrast[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
        value = value * inner.mean().relu() ** weight
        candidate = F.avg_pool2d(candidate, 2)
        reference = F.avg_pool2d(reference, 2)
    similarity, _ = similarity_maps(candidate, reference)
    return value * similarity.mean().relu() ** _WEIGHTS[-1]
