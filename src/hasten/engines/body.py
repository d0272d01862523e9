"""The blocks' stand-in at run time: checks a call against the engine's profile and runs it."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from hasten.engines.tensorrt.step import INPUTS, Shapes
from hasten.errors import EngineError

__all__ = ["Driver", "EngineBody"]

SIDE = 16  # pixels of a token


class Driver(Protocol):
    """What runs the exported graph for one image: onnxruntime, or an engine on a GPU."""

    what: str

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Velocity 1×S×C of inputs by name, each with a batch of one; on whatever device."""

    def close(self) -> None:
        """Free what it holds; it is not run again."""


class EngineBody:
    """(latents B×S×C, embedded text B×T×D, modulation row B×width, cos, sin) -> velocity B×S×C.

    The engine takes one image; a batch runs one after the other. EngineError where a call does not
    fit the profile that the engine was built for.
    """

    def __init__(self, driver: Driver, shapes: Shapes) -> None:
        self.driver = driver
        self.shapes = shapes

    def __call__(
        self, latents: Tensor, text: Tensor, row: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        self._check(latents.shape[1], text.shape[1])
        images = []
        for one in range(len(latents)):
            given = (latents[one, None], text[one, None], row[one, None], cos, sin)
            images.append(self.driver.run(dict(zip(INPUTS, given, strict=True))))
        return torch.cat(images).to(latents.device, latents.dtype)

    def _check(self, image: int, text: int) -> None:
        shapes = self.shapes
        if text != shapes.text:
            raise EngineError(
                f"the engine was exported for {shapes.text} text tokens, and this call has {text}",
                f"call with max_sequence_length = {shapes.text}, or export anew with another",
            )
        if not shapes.least <= image <= shapes.most:
            raise EngineError(
                f"this picture is as large as {_size(image)}, and the engine takes "
                f"{_size(shapes.least)} to {_size(shapes.most)}",
                "export anew with --max-size WIDTHxHEIGHT (engine.max_size)"
                if image > shapes.most
                else "ask for a larger picture",
            )


def _size(tokens: int) -> str:
    """A size of so many image tokens, as square as can be, and its pixels."""
    width = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    height = tokens // width
    return f"{width * SIDE}x{height * SIDE} ({tokens * SIDE**2} pixels)"
