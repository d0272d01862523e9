"""Keep weights in host memory and one component at a time on the accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hasten.passes.applied import Applied

__all__ = ["offload_models", "offload_modulations"]


def offload_models(pipe: Any) -> Applied:
    """Diffusers' model offload: text encoders, transformer and decoder take turns on the device."""
    device = pipe.device
    pipe.enable_model_cpu_offload()

    def undo() -> None:
        pipe.remove_all_hooks()
        pipe._all_hooks = []
        pipe.to(device)

    return Applied(
        name="offload",
        what=f"one component at a time on the accelerator: {pipe.model_cpu_offload_seq}",
        undo=undo,
    )


def offload_modulations(norms: Sequence[tuple[str, Any]], device: torch.device) -> Applied:
    """Move the modulation linears to host memory, from where the conditioning table reads them.

    norms: (name, norm) pairs, each norm with a `linear`. In FLUX.1 they hold 27 % of the weights.
    """
    linears = [_original(norm.linear) for _, norm in norms]
    moved = 0
    for linear in linears:
        for name, parameter in list(linear.named_parameters(recurse=False)):
            moved += parameter.nbytes
            values = parameter.detach().cpu()
            if torch.cuda.is_available():
                values = values.pin_memory()  # copies from it need not wait
            # A parameter of its own: a pipeline that shares the old one keeps it where it is.
            setattr(linear, name, nn.Parameter(values, parameter.requires_grad))

    def undo() -> None:
        for linear in linears:
            linear.to(device)

    return Applied(
        name="offload",
        what=f"{len(linears)} modulation linears, {moved / 2**20:.1f} MiB, in host memory",
        undo=undo,
    )


def _original(linear: nn.Module) -> nn.Module:
    """The linear itself where a reader of the table stands in for it."""
    inner = getattr(linear, "linear", linear)
    assert isinstance(inner, nn.Module)
    return inner
