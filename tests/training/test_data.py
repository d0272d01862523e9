"""Composites: geometry, colour, jitter."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training.data import composite
from training.models import SIZE


def square(side: int = 104) -> torch.Tensor:
    """One opaque green picture."""
    picture = torch.zeros(1, 4, side, side, dtype=torch.uint8)
    picture[:, 1] = picture[:, 3] = 255
    return picture


RED = torch.tensor([[1.0, 0.0, 0.0]])


def test_nothing_over_a_colour_is_the_colour() -> None:
    empty = torch.zeros(1, 4, 104, 104, dtype=torch.uint8)
    images = composite(empty, RED, torch.ones(1), torch.zeros(1, 2))
    assert images.shape == (1, 3, SIZE, SIZE)
    assert torch.equal(images, RED[:, :, None, None].expand_as(images))


@settings(deadline=None, max_examples=20)
@given(st.floats(0.7, 1.0), st.floats(-6, 6), st.floats(-6, 6))
def test_a_square_lands_where_it_should(scale, right, down) -> None:
    images = composite(square(), RED, torch.tensor([scale]), torch.tensor([[right, down]]))
    green = images[0, 1]
    assert abs(float(green.sum()) - (104 * scale) ** 2) < 0.02 * SIZE**2
    centre = torch.arange(SIZE) + 0.5
    weight = green / green.sum()
    assert abs(float((weight.sum(0) * centre).sum()) - SIZE / 2 - right) < 0.2
    assert abs(float((weight.sum(1) * centre).sum()) - SIZE / 2 - down) < 0.2
    assert torch.allclose(images[0, 0] + green, torch.ones(SIZE, SIZE), atol=1e-5)
