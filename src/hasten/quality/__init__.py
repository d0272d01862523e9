"""Metrics of the similarity between images and their references.

Every metric is a function `metric(candidate, reference)`. Its arguments are two N×3×H×W float
tensors in [0, 1] on the same device. It computes in float32 and returns N float32 values on that
device:

psnr     in dB; higher is closer; 100 for identical images
ssim     structural similarity; higher is closer; 1 for identical images
ms_ssim  SSIM over five scales; sides of at least `MS_SSIM_MIN_SIDE` pixels
lpips    learned perceptual distance; lower is closer; 0 for identical images; sides of at least
         `LPIPS_MIN_SIDE` pixels; `hasten.quality.lpips.LPIPS` is a differentiable module

All other inputs raise `hasten.errors.InputError`: integer images, values outside [0, 1], other
shapes, and batches that differ in size or device.
"""

from __future__ import annotations

from hasten.quality.lpips import LPIPS_MIN_SIDE, lpips
from hasten.quality.pixels import MS_SSIM_MIN_SIDE, PSNR_CAP_DB, ms_ssim, psnr, ssim

__all__ = [
    "LPIPS_MIN_SIDE",
    "MS_SSIM_MIN_SIDE",
    "PSNR_CAP_DB",
    "lpips",
    "ms_ssim",
    "psnr",
    "ssim",
]
