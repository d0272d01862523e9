"""Checks of the two batches of images that every metric takes."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import InputError

RANGE_TOLERANCE = 1e-6
"""How far outside [0, 1] a value may be, to allow for rounding of a final rescale."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPE_FIX = "give float tensors in [0, 1]: convert uint8 pixels with images.float() / 255"
_SHAPE_FIX = "give batches N×3×H×W: image.unsqueeze(0) for one image; repeat grey channels"
_RANGE_FIX = "rescale both to [0, 1]: (x + 1) / 2 from [-1, 1], x / 255 from bytes; then clamp"


def checked_pair(
    candidate: Tensor, reference: Tensor, metric: str, min_side: int = 1
) -> tuple[Tensor, Tensor]:
    """Check both batches and convert them to float32.

    Values up to `RANGE_TOLERANCE` outside [0, 1] are accepted and not clamped. Checking the range
    synchronises with the images' device.

    Args:
        candidate: N×3×H×W in [0, 1], H and W at least `min_side`.
        reference: The same shape, on the same device.
        metric: Name of the metric for error messages.
        min_side: In pixels.

    Raises:
        InputError: A batch is not a float tensor, has another shape, is empty, too small, outside
            [0, 1] or not finite, or the two differ in shape or device.
    """
    check_batches(candidate, reference, metric, min_side)
    _refuse(
        _RANGE_FIX,
        _range_fault(candidate, f"{metric}: candidate"),
        _range_fault(reference, f"{metric}: reference"),
    )
    return candidate.float(), reference.float()


def check_batches(candidate: Tensor, reference: Tensor, metric: str, min_side: int) -> None:
    """The checks of `checked_pair` except the range, without synchronising with the device."""
    first, second = f"{metric}: candidate", f"{metric}: reference"
    _refuse(_DTYPE_FIX, _dtype_fault(candidate, first), _dtype_fault(reference, second))
    _refuse(_SHAPE_FIX, _shape_fault(candidate, first), _shape_fault(reference, second))
    if candidate.shape != reference.shape:
        raise InputError(
            f"{metric}: candidate is {_shape(candidate)}, reference is {_shape(reference)}",
            "give the same number of images in the same size",
        )
    if candidate.device != reference.device:
        raise InputError(
            f"{metric}: candidate is on {candidate.device}, reference is on {reference.device}",
            "move one to the other's device: candidate.to(reference.device)",
        )
    if min(candidate.shape[-2:]) < min_side:
        raise InputError(
            f"{metric}: images are {_shape(candidate)}, but each side must be at least {min_side}",
            f"render images with sides of at least {min_side} pixels, or omit {metric}",
        )


def _refuse(fix: str, *checks: str | None) -> None:
    """Raise an InputError of the faults among `checks`; None is a check that passed."""
    faults = [fault for fault in checks if fault]
    if faults:
        raise InputError(faults, fix)


def _shape(images: Tensor) -> str:
    return "×".join(str(side) for side in images.shape) or "a scalar"


def _dtype_fault(images: object, name: str) -> str | None:
    if not isinstance(images, Tensor):
        return f"{name} is of type {type(images).__name__}, not a torch tensor"
    if images.dtype not in _DTYPES:
        return f"{name} has dtype {images.dtype}, not a float type"
    return None


def _shape_fault(images: Tensor, name: str) -> str | None:
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        return f"{name} is {_shape(images)}, not N×3×H×W with at least one image"
    return None


def _range_fault(images: Tensor, name: str) -> str | None:
    low, high = (bound.item() for bound in images.detach().aminmax())
    # NaN fails every comparison, so it is a fault as well.
    if low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE:
        return None
    return f"{name} spans [{low:.6g}, {high:.6g}], not [0, 1]"
