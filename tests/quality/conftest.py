"""Pictures that the quality tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Picture = Callable[..., Tensor]


@pytest.fixture(scope="session")
def picture() -> Picture:
    """`picture(height, width, n=1, seed=0)`: smooth colour with a grid and an edge, N×3×H×W."""

    def make(height: int, width: int, n: int = 1, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(n, 3, 5, 5, generator=generator)
        images = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
        images[..., ::7, : width // 2] *= 0.4
        images[..., height // 2 :, width // 3] = 0.95
        return images

    return make
