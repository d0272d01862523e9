"""Stores intermediate results of a calibration in a folder, so that it can be resumed.

Recordings are most of the work for a large model, and closed-loop trials for a small one. Both are
stored as soon as they are finished. Each has a checksum over its content and the calibration that
it belongs to, so that damaged, edited or unrelated results are not used. Recordings do not depend
on the budget, so several budgets can use the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.atomic import drafted, remove_drafts, write_text
from hasten.errors import InputError
from hasten.folder_lock import FolderLock
from hasten.passes.cache.predict import Weights
from hasten.sealed import DamagedError, seal, unseal_file

STATE = "calibration.json"
RECORDINGS = "recording-*.safetensors"
CHECKSUM = "sha256"  # in the metadata of a recording


class Fitted(NamedTuple):
    """A path, its weights as fitted in closed loop, and the objective's value with them."""

    error: float
    path: tuple[int, ...]
    order: int
    weights: tuple[Weights, ...]


class _State(BaseModel):
    """The key of a calibration and its trials so far."""

    key: dict[str, Any]
    trials: list[Fitted]


class CalibrationStore:
    """Recordings and trials of a calibration. Without a folder, trials are kept in memory only."""

    def __init__(self, folder: Path | None = None, key: dict[str, Any] | None = None) -> None:
        """Open the store, and create its folder if necessary.

        Args:
            folder: Where to store results; no other process may use it at the same time.
            key: JSON values that identify the calibration.

        Raises:
            InputError: The folder holds another calibration, is damaged, or cannot be used.
        """
        self.folder = folder
        self.key = key or {}
        self._trials: dict[tuple[tuple[int, ...], int], Fitted] = {}
        if folder is None:
            return
        with _usable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_drafts(folder)
        self._claim(folder / STATE)

    def recording(self, number: int) -> dict[str, Tensor] | None:
        """The tensors of batch `number`, or None if it has not been recorded.

        Raises:
            InputError: The file is damaged, or of another batch or calibration.
        """
        path = self._batch(number)
        if path is None or not path.is_file():
            return None
        with _usable(path), _intact(path):
            tensors, checksum = _load(path)
            if checksum != self._checksum(number, tensors):
                raise DamagedError("it was damaged or edited: the checksum differs")
        return tensors

    def keep_recording(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Store a finished batch atomically.

        Raises:
            InputError: The file cannot be written.
        """
        path = self._batch(number)
        if path is not None:
            with _usable(path), drafted(path) as draft:
                save_file(tensors, draft, {CHECKSUM: self._checksum(number, tensors)})

    def trial(self, path: tuple[int, ...], order: int) -> Fitted | None:
        """The closed-loop fit of a path, or None if it has not been run."""
        return self._trials.get((path, order))

    def keep_trial(self, fitted: Fitted) -> None:
        """Store a fit.

        Raises:
            InputError: The file cannot be written.
        """
        self._trials[fitted.path, fitted.order] = fitted
        if self.folder is not None:
            self._write_state(self.folder / STATE)

    def _batch(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"recording-{number:04d}.safetensors"

    def _checksum(self, number: int, tensors: dict[str, Tensor]) -> str:
        """A checksum over key, batch number, and the tensors' names, types, shapes and values."""
        names = sorted(tensors)
        kinds = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
        about = json.dumps([self.key, number, kinds], sort_keys=True)
        digest = hashlib.sha256(about.encode())
        for name in names:
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _claim(self, path: Path) -> None:
        """Load the trials of this calibration; refuse the folder of another calibration."""
        with _intact(path):
            state = unseal_file(path, _State)
        if state is None:
            self._write_state(path)
            return
        different = [name for name in self.key if state.key.get(name) != self.key[name]]
        if different:
            raise InputError(
                f"{path.parent} holds another calibration: it differs in {', '.join(different)}",
                f"delete {path.parent}, or repeat the command that created it",
            )
        self._trials = {(fit.path, fit.order): fit for fit in state.trials}

    def _write_state(self, path: Path) -> None:
        state = _State(key=self.key, trials=list(self._trials.values()))
        with _usable(path):
            write_text(path, seal(state.model_dump(mode="json"), indent=1))


@contextmanager
def open_store(folder: Path | None, key: dict[str, Any]) -> Iterator[CalibrationStore]:
    """Context manager that yields the store in a folder, which is locked for other processes.

    Args:
        folder: The folder; None for a store in memory.
        key: JSON values that identify the calibration.

    Raises:
        InputError: Another process uses the folder, it holds another calibration, is damaged, or
            cannot be used.
    """
    if folder is None:
        yield CalibrationStore()
        return
    with _usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder):
        yield CalibrationStore(folder, key)


def remove_store(folder: Path) -> None:
    """Delete a store's files, and its folder if it is then empty.

    Raises:
        InputError: Another process uses the folder, or its files cannot be deleted.
    """
    if not folder.is_dir():
        return
    with _usable(folder), FolderLock(folder):
        remove_drafts(folder)
        for path in (folder / STATE, *folder.glob(RECORDINGS)):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        folder.rmdir()


def _load(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file and its checksum."""
    with safe_open(path, "pt") as file:
        checksum = (file.metadata() or {}).get(CHECKSUM)
        return {name: file.get_tensor(name) for name in file.keys()}, checksum  # noqa: SIM118


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Turn errors of the file system, such as a full disk, into an InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: cannot be used: {reason}",
            "free some space there or choose another folder; finished results are kept",
        ) from None


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    """Turn errors of a damaged file into an InputError."""
    try:
        yield
    except (DamagedError, SafetensorError) as error:
        raise InputError(
            f"{path}: {' '.join(str(error).split())[:200]}",
            f"delete {path}: its content is then computed again",
        ) from None
