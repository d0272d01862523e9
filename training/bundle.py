"""Carry a run between machines: one tar file in parts of at most 15 MiB.

A finished run is bundled as what ships (`tiny_flux/`, `teacher/`, `evaluation.json`, grids), an
unfinished one as what it needs to continue elsewhere: the averaged weights in bf16, without
optimiser state. Join the parts with `cat DIR/bundle.tar.* | tar -x -C RUN`.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.run import Run

__all__ = ["bundle"]

PART_BYTES = 15 * 2**20
RESULTS = ("tiny_flux", "teacher", "evaluation.json")


def shrunk(phase: str, state: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint for another machine: one set of weights in bf16, and the clock."""
    # The judge's batch-norm statistics are in its state; the others are used by their average.
    kept = "model" if phase == "classifier" else "average"
    weights = state[kept]
    small = (
        [halved(tensor) for tensor in weights]
        if kept == "average"
        else {name: halved(tensor) for name, tensor in weights.items()}
    )
    return {"elapsed": state["elapsed"], "step": state["step"], kept: small}


def halved(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.bfloat16) if tensor.is_floating_point() else tensor.cpu()


def add_bytes(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def archive(run: Run) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        if run.finished("package") is not None:
            for name in RESULTS:
                tar.add(run.path(name), name)
        else:
            for phase in ("classifier", "autoencoder", "flow", "distill", "shrink"):
                state = run.load(f"{phase}.pt")
                if state is not None:
                    buffer = io.BytesIO()
                    torch.save(shrunk(phase, state), buffer)
                    add_bytes(tar, f"{phase}.pt", buffer.getvalue())
        for path in [*run.folder.glob("grid-*.png"), *run.folder.glob("*.done.json")]:
            # Latents do not travel, so the phase that makes them has to run again.
            if path.name != "latents.done.json" or run.finished("package") is not None:
                tar.add(path, path.name)
    return stream.getvalue()


def bundle(run: Run, out: Path) -> None:
    """Write `out/bundle.tar.00`, `.01`, …"""
    out.mkdir(parents=True, exist_ok=True)
    content = archive(run)
    for number, first in enumerate(range(0, len(content), PART_BYTES)):
        part = content[first : first + PART_BYTES]
        (out / f"bundle.tar.{number:02d}").write_bytes(part)
    print(f"[bundle] {len(content) / 2**20:.1f} MiB in {number + 1} parts", flush=True)
