"""Keep weights in host memory and one component at a time on the accelerator."""

from __future__ import annotations

from typing import Any

from hasten.passes.applied import Applied

__all__ = ["offload_models"]


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
