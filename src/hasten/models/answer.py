"""What a Diffusers transformer's forward returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["answer"]


def answer(velocity: Tensor, kwargs: dict[str, Any]) -> Any:
    """The velocity as a call with these keyword arguments expects it: in a tuple or an output."""
    if kwargs.get("return_dict") is False:
        return (velocity,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=velocity)
