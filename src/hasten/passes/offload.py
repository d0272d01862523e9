"""The `[offload]` pass: weights wait in host memory until they are needed on the accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hasten.step.applied import Applied
from hasten.step.protocols import Pipeline


def offload_models(pipe: Pipeline) -> Applied:
    """Enable Diffusers' model offload: one component at a time is on the device."""
    device = pipe.device
    pipe.enable_model_cpu_offload()
    return Applied(
        name="offload",
        description=f"one component at a time on the accelerator: {pipe.model_cpu_offload_seq}",
        undo=partial(_back_to, pipe, device),
    )


def offload_modulations(norms: Sequence[tuple[str, Any]], device: torch.device) -> Applied:
    """Move the modulation linears to host memory; the conditioning table reads them from there.

    In FLUX.1 they hold 27 % of the weights.

    Args:
        norms: (name, norm) pairs; each norm has a `linear`.
        device: The device that the linears return to when the pass is undone.
    """
    linears = [norm.linear for _, norm in norms]
    moved = 0
    for linear in linears:
        for name, parameter in list(linear.named_parameters(recurse=False)):
            moved += parameter.nbytes
            values = parameter.detach().cpu()
            if torch.cuda.is_available():
                values = values.pin_memory()  # allows asynchronous copies
            # A new parameter, so that a pipeline that shares the old one is not affected.
            setattr(linear, name, nn.Parameter(values, parameter.requires_grad))

    return Applied(
        name="offload",
        description=f"{len(linears)} modulation linears, {moved / 2**20:.1f} MiB, in host memory",
        undo=partial(_move, linears, device),
    )


def _back_to(pipe: Pipeline, device: torch.device) -> None:
    pipe.remove_all_hooks()
    pipe._all_hooks = []
    pipe.to(device)


def _move(modules: Sequence[nn.Module], device: torch.device) -> None:
    for module in modules:
        module.to(device)
