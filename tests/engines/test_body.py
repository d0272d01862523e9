"""The blocks' stand-in: batches one by one, dtypes, and calls that do not fit the profile."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from hasten.engines.body import EngineBody
from hasten.engines.tensorrt.step import INPUTS, Shapes
from hasten.errors import EngineError

SHAPES = Shapes(text=3, least=4, best=6, most=8)


class Driver:
    """Answers with twice the latents in float32, and keeps what it was given."""

    what = "a driver"

    def __init__(self) -> None:
        self.given: list[dict[str, Tensor]] = []

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        self.given.append(inputs)
        return inputs["latents"].float() * 2

    def close(self) -> None:
        self.given.clear()


def call(image: int = 5, text: int = 3, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(image)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    rotary = torch.randn(2, text + image, 4, generator=generator)
    return [normal(batch, image, 2), normal(batch, text, 7), normal(batch, 9), *rotary]


def test_a_batch_runs_one_image_at_a_time_each_with_its_own_inputs() -> None:
    driver = Driver()
    latents, text, row, cos, sin = call()
    velocity = EngineBody(driver, SHAPES)(latents, text, row, cos, sin)
    assert velocity.dtype == torch.bfloat16
    assert torch.equal(velocity, latents * 2)
    assert [tuple(given) for given in driver.given] == [INPUTS, INPUTS]
    for one, given in enumerate(driver.given):
        assert torch.equal(given["text"], text[one, None])
        assert torch.equal(given["row"], row[one, None])
        assert given["cos"] is cos


@pytest.mark.parametrize(
    ("image", "text", "fault", "fix"),
    [
        (
            9,
            3,
            "48x48 (2304 pixels), and the engine takes 32x32 ",
            "--max-size",
        ),
        (3, 3, "16x48 (768 pixels)", "larger picture"),
        (5, 4, "exported for 3 text tokens, and this call has 4", "max_sequence_length = 3"),
    ],
)
def test_what_is_outside_the_profile_is_refused_before_the_engine_sees_it(
    image: int, text: int, fault: str, fix: str
) -> None:
    driver = Driver()
    with pytest.raises(EngineError, match=re.escape(fault)) as caught:
        EngineBody(driver, SHAPES)(*call(image, text))
    assert fix in caught.value.fix
    assert driver.given == []


@pytest.mark.parametrize("image", [4, 8])
def test_the_profiles_ends_are_inside(image: int) -> None:
    assert EngineBody(Driver(), SHAPES)(*call(image)).shape == (2, image, 2)
