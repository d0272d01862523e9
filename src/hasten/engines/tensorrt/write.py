"""Put an export into its folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from hasten.engines.tensorrt.files import ENGINE
from hasten.engines.tensorrt.hashes import FileFacts, content_key, note_facts
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest
from hasten.engines.tensorrt.store import FIX_SPACE, Store, out_of_space
from hasten.errors import EngineError, InputError
from hasten.writing import sync

__all__ = ["write_export"]


def write_export(
    manifest: Manifest, files: Mapping[str, Path], out: Path | None, store: Store
) -> Manifest:
    """Put all files into `out`; one that holds them already stays as it is.

    files: where each lies now, whole. out: a resolved path; None for a folder of the store's, whose
    engine takes no room a second time.
    """
    folder = out if out is not None else _unnamed(manifest, store)
    with store.locked("exports", content_key({"folder": str(folder)})):
        try:
            if _is_there(manifest, folder, store):
                manifest.write(folder / MANIFEST)
            else:
                _replace(folder, manifest, files, shared=out is None)
        except OSError as error:
            if out_of_space(error):
                raise EngineError(f"{folder}: no space left for the export", FIX_SPACE) from error
            raise InputError(
                f"{folder}: cannot be written: {error.strerror or error}", "choose another --out"
            ) from error
        _note(manifest, folder, files)
    return manifest.model_copy(update={"folder": folder})


def _is_there(manifest: Manifest, folder: Path, store: Store) -> bool:
    """Whether a folder holds these very files, whole; says so where some are damaged."""
    there = _there(folder)
    if there is None or (there.files, there.shapes) != (manifest.files, manifest.shapes):
        return False
    damaged = manifest.damaged(folder)
    if damaged:
        store.tell(f"write: {', '.join(damaged)} in {folder} damaged, so it is written again")
    return not damaged


def _note(manifest: Manifest, folder: Path, files: Mapping[str, Path]) -> None:
    """Copies have new identities, and so has what got a second name."""
    for name, entry in manifest.files.items():
        for path in (folder / name, files[name]):
            note_facts(path, FileFacts(entry.bytes, entry.sha256))


def _unnamed(manifest: Manifest, store: Store) -> Path:
    content = {name: entry.sha256 for name, entry in manifest.files.items()}
    shapes = manifest.shapes.model_dump()
    return (store.root / "exports" / content_key({**content, "shapes": shapes})).absolute()


def _replace(folder: Path, manifest: Manifest, files: Mapping[str, Path], *, shared: bool) -> None:
    """Copy beside it, then rename; what was there goes last. The caller holds the folder's lock, so
    what a killed export left there can be removed."""
    draft, before = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if before.exists() and not folder.exists():
        os.replace(before, folder)  # killed between the two renames
    for path in (draft, before):
        shutil.rmtree(path, ignore_errors=True)
    try:
        draft.mkdir()
        for name, path in files.items():
            _place(path, draft / name, shared=shared and name == ENGINE)
        manifest.write(draft / MANIFEST)
        if folder.exists():
            os.replace(folder, before)
        os.replace(draft, folder)
    except BaseException:
        if before.exists():
            os.replace(before, folder)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)


def _place(source: Path, target: Path, *, shared: bool) -> None:
    """A second name for the file where that is wanted and can be, else a copy. Not of a graph's
    files: the onnx packages take a second name for an attack."""
    if shared:
        try:
            os.link(source, target)
        except OSError:  # a disk that knows no second names
            pass
        else:
            return
    shutil.copyfile(source, target)
    sync(target)


def _there(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except InputError:
        return None
