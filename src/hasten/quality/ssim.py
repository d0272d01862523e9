"""Structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861)."""

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
