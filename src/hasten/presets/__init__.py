"""The presets, the recommended ones first, with their speed, quality and requirements."""

from __future__ import annotations

from typing import NamedTuple


class Guide(NamedTuple):
    """How to choose a preset.

    Attributes:
        speed: Speed-up over the plain pipeline, see MEASURED; empty if it was not timed.
        images: How close the images are to the plain pipeline's.
        needs: The required hardware.
    """

    speed: str
    images: str
    needs: str


FP8 = "GPU 8.9+, or a CPU with FP8"
GUIDES = {
    "balanced": Guide("5.8×", "close", FP8),
    "int8": Guide("2.0×", "very close", "GPU 7.5+, or any CPU"),
    "fp8": Guide("2.1×", "close", FP8),
    "lossless": Guide("1.5×", "same but for rounding", "any; fast on a GPU"),
    "max": Guide("9.3×", "less close", FP8),
    "tensorrt-fp8": Guide("", "close", "RTX GPU 8.9+"),
    "cache-compile": Guide("3.7×", "close", "GPU 7.0+, or a CPU with a C++ compiler"),
    "cache": Guide("2.7×", "close", "any"),
    "compile": Guide("1.4×", "same but for rounding", "GPU 7.0+, or a CPU with a C++ compiler"),
    "fewer-steps": Guide("2.7×", "close", "any"),
    "baseline": Guide("1.0×", "the reference", "any"),
}
MEASURED = (
    "Speed: FLUX.1-dev's architecture on an H100 at 1024x1024 in 50 steps; `hasten bench` measures "
    "yours. How close: the bundled model's images. GPU 8.9+ means an NVIDIA GPU of compute "
    "capability 8.9 or later. The schedules of balanced and max are learned for the bundled model; "
    "`hasten calibrate` learns one for yours."
)
TO_START_WITH = {"cuda": ("balanced", "int8", "lossless"), "cpu": ("cache-compile",)}
"""By type of device, the best first; `cache` where none of them runs."""
