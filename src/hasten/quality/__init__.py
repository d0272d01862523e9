"""How close a candidate image is to its reference: tensors in, numbers out.

Every metric is a function `metric(candidate, reference)` of two N×3×H×W float tensors in [0, 1] on
any one device, computed in float32, that returns N float32 values on that device:

psnr     dB, higher is closer, 100 for identical images
ssim     structural similarity, higher is closer, 1 for identical images
ms_ssim  the same over five scales; sides from `MS_SSIM_MIN_SIDE` pixels up
lpips    learned perceptual distance, lower is closer, 0 for identical images; sides from
         `LPIPS_MIN_SIDE` pixels up; `hasten.quality.lpips.LPIPS` is its differentiable module

Anything else is refused with `hasten.errors.InputError`: integer images, values outside [0, 1],
other shapes, two sizes, two devices.
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
