"""What a calibration has done so far, in a folder, so that an interrupted one can be resumed.

Recordings are most of the work on a large model, closed-loop trials most of it on a small one; both
are kept as they finish. Each carries a checksum over its content and over what it is of, so that
nothing is taken over that is damaged, edited or of another calibration. Nothing of a recording
depends on the budget, so one folder serves several.
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
    """A path, its weights fitted in closed loop, and the error that leaves at the end."""

    error: float
    path: tuple[int, ...]
    order: int
    weights: tuple[Weights, ...]


class _State(BaseModel):
    """What a calibration is of, and the trials that it has made."""

    key: dict[str, Any]
    trials: list[Fitted]


class CalibrationStore:
    """Recordings and trials by what they are of. Without a folder, it only remembers trials."""

    def __init__(self, folder: Path | None = None, key: dict[str, Any] | None = None) -> None:
        """Use an existing folder.

        Args:
            folder: Where to keep everything; no other process may use it meanwhile.
            key: JSON values that say what is learned.

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
        """Tensors of batch `number`, if it has been recorded.

        Raises:
            InputError: The file is not what was written for this batch of this calibration.
        """
        path = self._batch(number)
        if path is None or not path.is_file():
            return None
        with _usable(path), _intact(path):
            tensors, checksum = _load(path)
            if checksum != self._checksum(number, tensors):
                raise DamagedError("its content is not what was written: the checksum differs")
        return tensors

    def keep_recording(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Keep a finished batch, whole or not at all.

        Raises:
            InputError: The file cannot be written.
        """
        path = self._batch(number)
        if path is not None:
            with _usable(path), drafted(path) as draft:
                save_file(tensors, draft, {CHECKSUM: self._checksum(number, tensors)})

    def trial(self, path: tuple[int, ...], order: int) -> Fitted | None:
        """The closed-loop fit of a path, if it has been run."""
        return self._trials.get((path, order))

    def keep_trial(self, fitted: Fitted) -> None:
        """Remember a fit, and write it down.

        Raises:
            InputError: The file cannot be written.
        """
        self._trials[fitted.path, fitted.order] = fitted
        if self.folder is not None:
            self._write_state(self.folder / STATE)

    def _batch(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"recording-{number:04d}.safetensors"

    def _checksum(self, number: int, tensors: dict[str, Tensor]) -> str:
        """Over what the calibration is of, the batch, and names, types, shapes and values."""
        names = sorted(tensors)
        kinds = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
        about = json.dumps([self.key, number, kinds], sort_keys=True)
        digest = hashlib.sha256(about.encode())
        for name in names:
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _claim(self, path: Path) -> None:
        """Take over the trials of this calibration. Refuses the folder of another."""
        with _intact(path):
            there = unseal_file(path, _State)
        if there is None:
            self._write_state(path)
            return
        other = [name for name in self.key if there.key.get(name) != self.key[name]]
        if other:
            raise InputError(
                f"{path.parent} holds another calibration: it differs in {', '.join(other)}",
                f"delete {path.parent}, or repeat the command that it is of",
            )
        self._trials = {(fit.path, fit.order): fit for fit in there.trials}

    def _write_state(self, path: Path) -> None:
        state = _State(key=self.key, trials=list(self._trials.values()))
        with _usable(path):
            write_text(path, seal(state.model_dump(mode="json"), indent=1))


@contextmanager
def open_store(folder: Path | None, key: dict[str, Any]) -> Iterator[CalibrationStore]:
    """The store in a folder, which no other process can open meanwhile.

    Raises:
        InputError: Another process uses the folder, or as `CalibrationStore` raises.
    """
    if folder is None:
        yield CalibrationStore()
        return
    with _usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder):
        yield CalibrationStore(folder, key)


def remove_store(folder: Path) -> None:
    """Delete what a store keeps in a folder, and the folder if nothing else is in it.

    Raises:
        InputError: Another process uses the folder, or its files cannot be deleted.
    """
    if not folder.is_dir():
        return
    with _usable(folder), FolderLock(folder):
        remove_drafts(folder)
        for path in (folder / STATE, *folder.glob(RECORDINGS)):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # something else is in it
        folder.rmdir()


def _load(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of a file, and the checksum that it carries."""
    with safe_open(path, "pt") as file:
        checksum = (file.metadata() or {}).get(CHECKSUM)
        return {name: file.get_tensor(name) for name in file.keys()}, checksum  # noqa: SIM118


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Errors of the file system, a full disk among them, as one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: cannot be used: {reason}",
            "make room there or choose another place; what was finished before is kept",
        ) from None


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    """Errors of a damaged file, as one line."""
    try:
        yield
    except (DamagedError, SafetensorError) as error:
        raise InputError(
            f"{path}: {' '.join(str(error).split())[:200]}",
            f"delete {path}: what was in it is then computed again",
        ) from None
