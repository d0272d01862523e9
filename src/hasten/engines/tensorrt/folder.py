"""The folder that an export goes to: what in it is an export's, and whether it can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hasten.engines.tensorrt.files import AMAX, DATA, ENGINE, GRAPH, RUNTIME_CACHE
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest
from hasten.errors import InputError

__all__ = ["OURS", "SCRATCH", "check_folder", "nearest", "resolved"]

OURS = {MANIFEST, GRAPH, DATA, ENGINE, AMAX, RUNTIME_CACHE}  # what an export is made of
SCRATCH = ".hasten-export"  # in the folder while files are put there, see `write`
PROBE = ".hasten-probe-"
ANOTHER = "choose another --out"


def resolved(out: Path) -> Path:
    """Where a link leads to, which is what an export replaces. InputError where that has no end."""
    try:
        return out.resolve()
    except (OSError, RuntimeError):
        raise InputError(f"{out}: a link that leads to itself", ANOTHER) from None


def nearest(path: Path) -> Path:
    """It, or the folder around it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def check_folder(given: Path) -> None:
    """It can be made and written, and nothing is lost that no export wrote. Leaves nothing there.

    Raises InputError.
    """
    out = resolved(given)
    place = nearest(out)
    if not place.is_dir():
        raise InputError(f"{place}: a file, not a folder", ANOTHER)
    try:
        with tempfile.NamedTemporaryFile(prefix=PROBE, dir=place):
            pass
        names = {path.name for path in out.iterdir()} if place == out else set()
    except OSError as error:
        raise InputError(
            f"{place}: cannot be written: {error.strerror or error}", ANOTHER
        ) from None
    _refuse_others(out, {name for name in names if not name.startswith(PROBE)} - {SCRATCH})


def _refuse_others(out: Path, names: set[str]) -> None:
    """InputError for files of someone else's, or that might be."""
    if not names:
        return
    if strange := sorted(names - OURS):
        raise InputError(
            f"{out}: there are files in it that no export wrote, such as {strange[0]}",
            f"{ANOTHER}, or move them away",
        )
    if _no_manifest(out / SCRATCH) is None:  # killed while it replaced its files
        return
    if fault := _no_manifest(out):
        raise InputError(
            f"{out}: {', '.join(sorted(names))} may be someone else's: {fault}",
            f"delete the folder if nobody needs it, or {ANOTHER}",
        )


def _no_manifest(folder: Path) -> str | None:
    """Why there is no manifest of an export in a folder; None where there is one."""
    try:
        Manifest.read(folder)
    except InputError as error:
        return error.faults[0]
    return None
