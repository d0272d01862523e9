"""What a calibration has done so far, in a folder, so that an interrupted one goes on.

Recordings are most of the work on a large model, closed-loop trials most of it on a small one; both
are kept as they finish. Nothing of a recording depends on the budget, so one folder serves several.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.errors import InputError
from hasten.passes.cache.predict import Weights

__all__ = ["Fitted", "Store", "remove_store"]

KEY = "calibration.json"
TRIALS = "trials.jsonl"


class Fitted(NamedTuple):
    """A path, its weights fitted in closed loop, and the error that leaves at the end."""

    error: float
    path: tuple[int, ...]
    order: int
    weights: tuple[Weights, ...]


class Store:
    """Recordings and trials by what they are of. Without a folder, it only remembers trials."""

    def __init__(self, folder: Path | None = None, key: dict[str, Any] | None = None) -> None:
        """Open or make `folder`. `key` says what is learned, in values that JSON keeps as they are.

        Raises InputError where the folder holds another calibration or cannot be written.
        """
        self.folder = folder
        self._trials: dict[tuple[tuple[int, ...], int], Fitted] = {}
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim(key or {})
            self._trials = {(fit.path, fit.order): fit for fit in self._read_trials()}
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be used: {error.strerror}", "choose another place"
            ) from None

    def recording(self, number: int) -> dict[str, Tensor] | None:
        """Tensors of batch `number`, if it has been recorded."""
        path = self._batch(number)
        return load_file(path) if path is not None and path.is_file() else None

    def keep_recording(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Keep a finished batch; an interrupt in between leaves nothing half-written."""
        path = self._batch(number)
        if path is not None:
            draft = path.with_suffix(f".{os.getpid()}.tmp")
            save_file(tensors, draft)
            os.replace(draft, path)

    def trial(self, path: tuple[int, ...], order: int) -> Fitted | None:
        """The closed-loop fit of a path, if it has been run."""
        return self._trials.get((path, order))

    def keep_trial(self, fitted: Fitted) -> None:
        """Remember a fit, and write it down."""
        self._trials[fitted.path, fitted.order] = fitted
        if self.folder is not None:
            with (self.folder / TRIALS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(fitted._asdict()) + "\n")

    def _batch(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"recording-{number:04d}.safetensors"

    def _claim(self, key: dict[str, Any]) -> None:
        assert self.folder is not None
        path = self.folder / KEY
        if not path.is_file():
            path.write_text(json.dumps(key, indent=1), "utf-8")
            return
        try:
            there = json.loads(path.read_text("utf-8"))
        except ValueError:
            there = {}
        other = [name for name in key if there.get(name) != json.loads(json.dumps(key[name]))]
        if other:
            raise InputError(
                f"{self.folder} holds another calibration: it differs in {', '.join(other)}",
                f"delete {self.folder}, or repeat the command that it is of",
            )

    def _read_trials(self) -> Sequence[Fitted]:
        assert self.folder is not None
        path = self.folder / TRIALS
        if not path.is_file():
            return []
        whole, newline, _ = path.read_text("utf-8").rpartition("\n")
        path.write_text(whole + newline, "utf-8")  # an interrupt may have cut the last line short
        return [_fitted(json.loads(line)) for line in whole.splitlines()]


def remove_store(folder: Path) -> None:
    """Delete what a Store keeps there, and the folder if nothing else is in it."""
    for pattern in (KEY, TRIALS, "recording-*.safetensors", "recording-*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _fitted(told: dict[str, Any]) -> Fitted:
    weights = tuple(tuple(row) for row in told["weights"])
    return Fitted(told["error"], tuple(told["path"]), told["order"], weights)
