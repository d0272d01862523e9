"""A run directory and its clock: phases stop on time and continue in a later call."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Clock", "Run"]

LOG_SECONDS = 5.0
SAVE_SECONDS = 120.0


@dataclass
class Run:
    """Where a run keeps its files, and when the present call has to stop (monotonic seconds)."""

    folder: Path
    device: torch.device
    deadline: float
    seed: int = 0
    smoke: bool = False
    compile: bool = True

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / name

    def save(self, name: str, content: Any) -> None:
        """Write a checkpoint; it replaces the old one only when it is complete."""
        partial = self.path(f"{name}.partial")
        torch.save(content, partial)
        partial.replace(self.path(name))

    def load(self, name: str) -> Any | None:
        """The checkpoint, or None if there is none yet."""
        path = self.path(name)
        if not path.exists():
            return None
        return torch.load(path, map_location=self.device, weights_only=True)

    def generator(self, offset: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1000 * self.seed + offset)

    def finish(self, phase: str, **numbers: float) -> None:
        """Mark a phase as finished and store its measurements."""
        self.path(f"{phase}.done.json").write_text(json.dumps(numbers, indent=2))
        told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        print(f"[{phase}] done: {told}", flush=True)

    def finished(self, phase: str) -> dict[str, float] | None:
        path = self.path(f"{phase}.done.json")
        return json.loads(path.read_text()) if path.exists() else None


@dataclass
class Clock:
    """Training time of one phase, carried from call to call.

    `progress` goes from 0 to 1 over `budget` seconds of training. Time before `start` (loading,
    compilation) does not count. `running` turns false at the end of the budget or of the call.
    """

    phase: str
    budget: float
    deadline: float
    save: Callable[[], None]
    elapsed: float = 0.0
    step: int = 0
    begun: float | None = None
    first_step: int = 0
    logged: float = 0.0
    saved: float = 0.0

    def start(self) -> None:
        self.begun = self.logged = self.saved = time.monotonic()
        self.first_step = self.step

    @property
    def seconds(self) -> float:
        here = 0.0 if self.begun is None else time.monotonic() - self.begun
        return self.elapsed + here

    @property
    def progress(self) -> float:
        return min(self.seconds / self.budget, 1.0)

    @property
    def running(self) -> bool:
        return self.progress < 1.0 and time.monotonic() < self.deadline

    def tick(self, loss: torch.Tensor, rate: float) -> None:
        """Count a step; now and then print the loss (which waits for the device) and save."""
        self.step += 1
        now = time.monotonic()
        if now - self.logged > LOG_SECONDS:
            told = f"loss {loss.item():.4f}  lr {rate:.2g}"
            speed = (self.step - self.first_step) / (time.monotonic() - (self.begun or 0.0))
            print(
                f"[{self.phase}] {self.seconds:6.1f}/{self.budget:.0f} s  step {self.step}  "
                f"{speed:.1f} it/s  {told}",
                flush=True,
            )
            self.logged = time.monotonic()
        if now - self.saved > SAVE_SECONDS:
            self.save()
            self.saved = time.monotonic()

    def state(self) -> dict[str, float]:
        return {"elapsed": self.seconds, "step": self.step}
