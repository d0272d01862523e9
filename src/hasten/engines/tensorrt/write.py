"""Put an export into its folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hasten.atomic import sync
from hasten.engines.tensorrt.files import ENGINE, RUNTIME_CACHE
from hasten.engines.tensorrt.folder import OURS, SCRATCH
from hasten.engines.tensorrt.hashes import FileFacts, content_key, note_facts
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest
from hasten.engines.tensorrt.store import FIX_SPACE, Store, out_of_space
from hasten.errors import EngineError, InputError

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
            missing = manifest.damaged(folder)
            if before := _export_in(folder):
                _tell_of(before, manifest, missing, store)
            wanted = {name: files[name] for name in missing}
            _put(folder, manifest, wanted, shared=out is None)
        except OSError as error:
            if out_of_space(error):
                raise EngineError(f"{folder}: no space left for the export", FIX_SPACE) from error
            raise InputError(
                f"{folder}: cannot be written: {error.strerror or error}", "choose another --out"
            ) from error
        _note(manifest, folder, files)
    return manifest.model_copy(update={"folder": folder})


def _note(manifest: Manifest, folder: Path, files: Mapping[str, Path]) -> None:
    """Copies have new identities, and so has what got a second name."""
    for name, entry in manifest.files.items():
        for path in (folder / name, files[name]):
            note_facts(path, FileFacts(entry.bytes, entry.sha256))


def _unnamed(manifest: Manifest, store: Store) -> Path:
    content = {name: entry.sha256 for name, entry in manifest.files.items()}
    shapes = manifest.shapes.model_dump()
    return (store.root / "exports" / content_key({**content, "shapes": shapes})).absolute()


def _put(folder: Path, manifest: Manifest, files: Mapping[str, Path], *, shared: bool) -> None:
    """Copy what is not there yet into a folder within, then move each file to its place.

    The manifest is removed first and comes last, so that nothing without one is taken for an export
    and nothing with one is half an export. From when the one within is written until it has moved,
    that one says that what lies in the folder is ours, whoever was killed meanwhile. The caller
    holds the folder's lock.
    """
    kept = {MANIFEST, *manifest.files}
    if ENGINE in manifest.files and ENGINE not in files:
        kept.add(RUNTIME_CACHE)  # of this very engine
    made, scratch = not folder.exists(), folder / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        for name, path in files.items():
            _place(path, scratch / name, shared=shared and name == ENGINE)
        manifest.write(scratch / MANIFEST)
    except BaseException:
        _empty(scratch, made=made)
        raise
    others = [folder / name for name in OURS - kept if (folder / name).exists()]
    if files or others:
        (folder / MANIFEST).unlink(missing_ok=True)
    for path in others:
        path.unlink()
    for name in (*files, MANIFEST):
        os.replace(scratch / name, folder / name)
    shutil.rmtree(scratch, ignore_errors=True)


def _empty(scratch: Path, *, made: bool) -> None:
    """Leave the folder around as it was; a manifest of a run that was killed before stays."""
    with suppress(OSError):
        for path in scratch.iterdir():
            if path.name != MANIFEST:
                path.unlink()
        scratch.rmdir()
        if made:
            scratch.parent.rmdir()


def _place(source: Path, target: Path, *, shared: bool) -> None:
    """A second name for the file where that is wanted and can be, else a copy. Not of a graph's
    files: the onnx packages take a second name for an attack."""
    target.unlink(missing_ok=True)  # what a run that was killed left
    if shared:
        try:
            os.link(source, target)
        except OSError:  # a disk that knows no second names
            pass
        else:
            return
    shutil.copyfile(source, target)
    sync(target)


def _export_in(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except InputError:
        return None


def _tell_of(
    before: Manifest, manifest: Manifest, missing: Mapping[str, str], store: Store
) -> None:
    """Say what happens to an export that is there already, unless it stays."""
    if before.files != manifest.files:
        what = f"engine for {', '.join(before.targets)}" if before.targets else "graph"
        store.tell(
            f"write: the {before.precision} {what} of {before.model} in {before.folder} is replaced"
        )
    elif missing:
        faults = ", ".join(f"{name} {fault}" for name, fault in missing.items())
        store.tell(f"write: {faults} in {before.folder}, so it is written again")
