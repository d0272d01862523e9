"""Measures one image: its total time, the time of its denoising loop, and the loop's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hasten.benchmark.timer import peak_memory, reset_peak_memory, synchronize

__all__ = ["Image", "Stopwatch"]

PROBES = 1024


@dataclass(frozen=True)
class Image:
    """seconds: from the call to the finished picture; loop_seconds: until the decoder is called.

    peak_bytes: the most that was allocated in the loop; probe: values of the final latents, evenly
    spread, by which rows that were given the same image are compared; finite: of the picture.
    """

    seconds: float
    loop_seconds: float
    peak_bytes: int
    probe: list[float]
    finite: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Stopwatch:
    """Times calls of a pipeline. It looks at the clock where the VAE's `decode` is called: between
    loop and decoder there is one synchronisation that the plain pipeline has not."""

    def __init__(self, vae: Any, device: torch.device) -> None:
        self.device = device
        self.loop_end = 0.0
        self.peak_bytes = 0
        self.latents: Tensor | None = None
        decode = vae.decode

        def watched(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            self.loop_end = perf_counter()
            self.peak_bytes, _ = peak_memory(self.device)
            self.latents = latents
            return decode(latents, *args, **kwargs)

        vae.decode = watched

    def time(self, call: Callable[..., Any], arguments: dict[str, Any]) -> Image:
        """Render one image and say how long it took; the device is idle before and after."""
        reset_peak_memory(self.device)
        self.latents = None
        synchronize(self.device)
        start = perf_counter()
        picture = call(**arguments).images
        synchronize(self.device)
        end = perf_counter()
        if self.latents is None:
            raise RuntimeError("the pipeline never called vae.decode, so its loop was not timed")
        return Image(
            seconds=end - start,
            loop_seconds=self.loop_end - start,
            peak_bytes=self.peak_bytes,
            probe=_probe(self.latents),
            finite=bool(torch.isfinite(picture).all()),
        )


def _probe(latents: Tensor) -> list[float]:
    flat = latents.detach().flatten().float().cpu()
    values: list[float] = flat[:: max(1, flat.numel() // PROBES)].nan_to_num().tolist()
    return [round(value, 5) for value in values]
