"""Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.quality.images import checked_pair
from hasten.quality.ssim import MARGIN, similarity_maps

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
