"""Peak signal-to-noise ratio."""

from __future__ import annotations

from torch import Tensor

from hasten.quality.images import checked_pair

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
