"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924).

Version 0.1 on AlexNet with the authors' linear heads, fitted to human judgements: the variant that
papers report. The weights are bundled (`assets/lpips_alex.safetensors`, convolutions and heads in
float16), so nothing is downloaded. The arithmetic is float32. Compared with the authors' float32
weights, values differ by at most 0.1 %. On NVIDIA GPUs, torch rounds the inputs of convolutions to
TF32 unless `torch.backends.cudnn.allow_tf32` is off, which changes values by less than 1e-4.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from hasten.errors import InputError
from hasten.quality.images import check_batches, checked_pair

LPIPS_MIN_SIDE = 31
"""The smallest side, in pixels, for which AlexNet's last convolutions have an output."""

# (stride, padding, max-pooled before) of AlexNet's five convolutions.
_CONVOLUTIONS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))
# The authors' input normalisation, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class LPIPS(nn.Module):
    """LPIPS as a module that is differentiable in both images, for use as a training loss.

    `forward(candidate, reference)` takes N×3×H×W float images, nominally in [0, 1], with sides of
    at least 31 pixels. It returns N float32 distances >= 0. The range is not checked, because a
    decoder's raw output exceeds it and a check would synchronise with the device on every step.
    Autocast is disabled inside. The weights are non-persistent buffers: they move with
    `.to(device)`, but are not parameters and not in `state_dict()`.

    Raises:
        InputError: The shape or dtype is wrong, or the batches differ in shape or device.
    """

    def __init__(self) -> None:
        super().__init__()
        asset = files("hasten").joinpath("assets", "lpips_alex.safetensors")
        for name, tensor in load(asset.read_bytes()).items():
            self.register_buffer(name.replace(".", "_"), tensor.float(), persistent=False)
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            constant = torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def forward(self, candidate: Tensor, reference: Tensor) -> Tensor:
        check_batches(candidate, reference, "lpips", LPIPS_MIN_SIDE)
        with torch.autocast(candidate.device.type, enabled=False):
            # Two passes instead of one over both batches: equal images are then computed by the
            # same kernels at any batch size, so their distance is exactly 0.
            pairs = zip(
                self._features(candidate.float()), self._features(reference.float()), strict=True
            )
            layers = [
                _distance(a, b, self.get_buffer(f"head{i}_weight"))
                for i, (a, b) in enumerate(pairs)
            ]
            return torch.stack(layers).sum(dim=0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """The five ReLU outputs of AlexNet, each scaled to unit length over its channels."""
        hidden = (2 * images - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        features = []
        for i, (stride, padding, pooled) in enumerate(_CONVOLUTIONS):
            if pooled:
                hidden = F.max_pool2d(hidden, kernel_size=3, stride=2)
            kernel = self.get_buffer(f"conv{i}_weight")
            bias = self.get_buffer(f"conv{i}_bias")
            hidden = F.conv2d(hidden, kernel, bias, stride, padding).relu()
            features.append(_unit_length(hidden))
        return features


def lpips(candidate: Tensor, reference: Tensor, *, batch_size: int = 8) -> Tensor:
    """Perceptual distance of N image pairs. Lower is closer.

    The result has no gradient; use `LPIPS` for training.

    Args:
        candidate: N×3×H×W, float, in [0, 1], with sides of at least 31 pixels.
        reference: The same shape, on the same device.
        batch_size: Number of pairs per pass of the network. A pair at 1024×1024 pixels takes about
            0.1 GB.

    Returns:
        N float32 values >= 0 on the images' device; exactly 0 for identical images.

    Raises:
        InputError: The shape, range or dtype is wrong, the batches differ in shape or device, or
            `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise InputError(f"lpips: batch_size is {batch_size}", "give 1 or more")
    candidate, reference = checked_pair(candidate, reference, "lpips", LPIPS_MIN_SIDE)
    network = _network(candidate.device)
    chunks = zip(
        torch.split(candidate, batch_size), torch.split(reference, batch_size), strict=True
    )
    with torch.no_grad():
        return torch.cat([network(a, b) for a, b in chunks])


@cache
def _network(device: torch.device) -> LPIPS:
    return LPIPS().to(device)


def _unit_length(features: Tensor) -> Tensor:
    # The slope of the square root is infinite at 0, which occurs in black areas. The floor makes
    # the gradient 0 there instead of NaN, and does not change any value.
    squared = features.square().sum(dim=1, keepdim=True).clamp_min(_EPSILON**2)
    return features / (squared.sqrt() + _EPSILON)


def _distance(candidate: Tensor, reference: Tensor, head: Tensor) -> Tensor:
    """One layer's term of equation 1: weighted squared difference, averaged over positions."""
    weighted = (candidate - reference).square() * head.view(1, -1, 1, 1)
    return weighted.sum(dim=1).mean(dim=(1, 2))
