"""Writes an export to its output folder, and checks what may be replaced there.

Files are copied into a temporary subfolder and then moved to their places. The old manifest is
removed first and the new one is moved last, so a folder with a manifest is always a complete
export. While files are moved, the manifest in the subfolder marks the files outside as parts of an
export.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hasten.atomic import drafted, remove_drafts, write_text
from hasten.engines.tensorrt.files import (
    AMAX,
    DATA,
    ENGINE,
    GRAPH,
    RUNTIME_CACHE,
    note_facts,
    read_sealed,
    write_sealed,
)
from hasten.engines.tensorrt.keys import content_key
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest
from hasten.engines.tensorrt.store import FIX_SPACE, StageStore, out_of_space
from hasten.errors import EngineError, InputError
from hasten.log import logger
from hasten.recipe import Recipe

RECIPE = "recipe.toml"
OURS = {MANIFEST, GRAPH, DATA, ENGINE, AMAX, RUNTIME_CACHE, RECIPE}  # the files of an export
SCRATCH = ".hasten-export"  # the temporary subfolder
PROBE = ".hasten-probe-"
ANOTHER = "choose another --out"


def resolved(out: Path) -> Path:
    """Resolve the links of an output path.

    Raises:
        InputError: The path is a link to itself or is not a valid path.
    """
    try:
        path = out.resolve()
        os.path.lexists(path)  # ValueError for a NUL
        if path.parent.is_dir() and len(os.fsencode(path.name)) > 255:
            raise ValueError("its name is too long")
        return path
    except (OSError, RuntimeError):
        raise InputError(f"{out}: a link to itself", ANOTHER) from None
    except ValueError as error:
        raise InputError(f"{str(out)!r:.200}: not a valid path: {error}", ANOTHER) from None


def closest_existing(path: Path) -> Path:
    """The path, or its closest parent that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def check_folder(given: Path) -> None:
    """Check that a folder can be created and written, and that no foreign files would be lost.

    The check leaves no files behind.

    Raises:
        InputError: The folder cannot be written, or it has files that no export wrote.
    """
    out = resolved(given)
    place = closest_existing(out)
    if not place.is_dir():
        raise InputError(f"{place}: a file, not a folder", ANOTHER)
    try:
        with tempfile.NamedTemporaryFile(prefix=PROBE, dir=place):
            pass
        names = {path.name for path in out.iterdir()} if place == out else set()
    except OSError as error:
        raise _unwritable(place, error) from None
    ignored = (PROBE, f".{RECIPE}.")  # probes, and drafts that a killed run left
    _refuse_others(out, {name for name in names if not name.startswith(ignored)} - {SCRATCH})


def write_export(
    manifest: Manifest, files: Mapping[str, Path], out: Path | None, store: StageStore
) -> Manifest:
    """Write all files of an export to a folder; files that are already there are not rewritten.

    Args:
        manifest: The manifest of the export.
        files: The path of each complete file in the store.
        out: A resolved path; None for a folder in the store, where the engine is a hard link.
        store: The store of the stages.

    Returns:
        The manifest, with its folder.

    Raises:
        EngineError: The disk is full. A previous export in the folder is unchanged.
        InputError: The folder cannot be written.
    """
    folder = out if out is not None else _unnamed(manifest, store)
    with store.locked("exports", content_key({"folder": str(folder)})):
        try:
            missing = manifest.damaged(folder)
            if before := _export_in(folder):
                _log_changes(before, manifest, missing)
            wanted = {name: files[name] for name in missing}
            _put(folder, manifest, wanted, shared=out is None)
            if out is not None:
                remove_drafts(out)
                _write_recipe(before, manifest, out)
        except OSError as error:
            if out_of_space(error):
                raise EngineError(f"{folder}: no space left for the export", FIX_SPACE) from error
            raise _unwritable(folder, error) from error
        for name, facts in manifest.files.items():  # copies and hard links have new identities
            for path in (folder / name, files[name]):
                note_facts(path, facts)
    return manifest.model_copy(update={"folder": folder})


def finished(store: StageStore, key: str, out: Path) -> Manifest | None:
    """The export in `out` if a request with this key wrote it and its files are intact."""
    memo = read_sealed(_memo(store, key), request=key, out=str(out.absolute()))
    manifest = None if memo is None else _export_in(out)
    if memo is None or manifest is None or memo != _identity_of(manifest) or manifest.damaged(out):
        return None
    if not (out / RECIPE).is_file():
        return None
    return manifest


def remember(store: StageStore, key: str, out: Path, manifest: Manifest) -> None:
    """Record the result of a request for `finished`, which makes repeated requests faster."""
    memo = _memo(store, key)
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(memo, _identity_of(manifest), request=key, out=str(out.absolute()))


def _memo(store: StageStore, key: str) -> Path:
    return store.root / "finished" / f"{key}.json"


def _identity_of(manifest: Manifest) -> dict[str, str]:
    return {"manifest": hashlib.sha256(manifest.text().encode()).hexdigest()}


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"{folder}: cannot be written: {error.strerror or error}", ANOTHER)


def _refuse_others(out: Path, names: set[str]) -> None:
    """Raise InputError for files that may not belong to an export."""
    if not names:
        return
    if strange := sorted(name for name in names if name not in OURS or (out / name).is_dir()):
        raise InputError(
            f"{out}: the folder has files that no export wrote, such as {strange[0]}",
            f"{ANOTHER}, or move them to another folder",
        )
    if _export_in(out / SCRATCH):  # killed while it replaced its files
        return
    try:
        Manifest.read(out)
    except InputError as error:
        raise InputError(
            f"{out}: {', '.join(sorted(names))} may not belong to an export: {error.faults[0]}",
            f"delete the folder if it is not needed, or {ANOTHER}",
        ) from None


def _export_in(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except InputError:
        return None


def _write_recipe(before: Manifest | None, manifest: Manifest, folder: Path) -> None:
    """A recipe that runs the export. One that is there, edited or not, stays where it fits."""
    path, facts = folder / RECIPE, (manifest.precision, bool(manifest.targets))
    same = before is not None and (before.precision, bool(before.targets)) == facts
    if same and path.is_file():
        return
    kind = "tensorrt" if manifest.targets else "onnxruntime"
    recipe = Recipe.from_dict(
        {
            "name": "recipe",
            "description": f"the exported blocks of {manifest.model}",
            "sampling": {"max_sequence_length": manifest.shapes.text},
            "engine": {"kind": kind, "precision": manifest.precision, "path": "."},
        }
    )
    write_text(path, recipe.to_toml())


def _unnamed(manifest: Manifest, store: StageStore) -> Path:
    content = {name: entry.sha256 for name, entry in manifest.files.items()}
    shapes = manifest.shapes.model_dump()
    return (store.root / "exports" / content_key({**content, "shapes": shapes})).absolute()


def _put(folder: Path, manifest: Manifest, files: Mapping[str, Path], *, shared: bool) -> None:
    """Copy missing files, then move them to their places. The caller holds the lock."""
    kept = {MANIFEST, RECIPE, *manifest.files}
    if ENGINE in manifest.files and ENGINE not in files:
        kept.add(RUNTIME_CACHE)  # it belongs to this engine
    made, scratch = not folder.exists(), folder / SCRATCH
    if scratch.is_symlink():
        scratch.unlink()
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        for name, path in files.items():
            _place(path, scratch / name, shared=shared and name == ENGINE)
        if (scratch / MANIFEST).is_symlink():
            (scratch / MANIFEST).unlink()
        manifest.write(scratch / MANIFEST)
    except BaseException:
        _empty(scratch, made=made)
        raise
    others = [folder / name for name in OURS - kept if os.path.lexists(folder / name)]
    if files or others:
        (folder / MANIFEST).unlink(missing_ok=True)
    for path in others:
        path.unlink()
    for name in (*files, MANIFEST):
        os.replace(scratch / name, folder / name)
    shutil.rmtree(scratch, ignore_errors=True)


def _empty(scratch: Path, *, made: bool) -> None:
    """Empty the subfolder after an error, but keep a manifest of an earlier, killed run."""
    with suppress(OSError):
        for path in scratch.iterdir():
            if path.name != MANIFEST:
                path.unlink()
        scratch.rmdir()
        if made:
            scratch.parent.rmdir()


def _place(source: Path, target: Path, *, shared: bool) -> None:
    """Make a hard link if `shared` and possible, else copy the file.

    The files of a graph must be copies: the onnx packages reject hard links as unsafe.
    """
    target.unlink(missing_ok=True)  # of a killed run, or a link
    if shared:
        with suppress(OSError):  # the file system has no hard links
            os.link(source, target)
            return
    with drafted(target) as draft:
        shutil.copyfile(source, draft)


def _log_changes(before: Manifest, manifest: Manifest, missing: Mapping[str, str]) -> None:
    """Log the changes to an existing export."""
    if before.files != manifest.files:
        content = f"engine for {', '.join(before.targets)}" if before.targets else "graph"
        logger.info(
            f"write: replacing {before.precision} {content} of {before.model} in {before.folder}"
        )
    elif missing:
        faults = ", ".join(f"{name} {fault}" for name, fault in missing.items())
        logger.info(f"write: {faults} in {before.folder}; writing it again")
