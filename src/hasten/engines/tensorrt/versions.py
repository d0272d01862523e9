"""The versions that a stage's result depends on."""

from __future__ import annotations

from hasten.machine import version_of

__all__ = ["LIBRARIES", "STAGES", "versions"]

STAGES = 2  # raise it when what a stage makes of the same input changes
LIBRARIES = {
    "calibrate": ("torch", "diffusers", "transformers", "nvidia-modelopt"),
    "export": ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir"),
    "verify": ("torch", "diffusers", "onnx", "onnxruntime"),
    "build": ("tensorrt-rtx-cu13",),
}


def versions(stage: str | None = None) -> dict[str, str | None]:
    """Of what a stage uses, or all of them use; None for what is not installed."""
    names = LIBRARIES[stage] if stage else dict.fromkeys(sum(LIBRARIES.values(), ()))
    return {name: version_of(name) for name in names}
