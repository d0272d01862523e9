"""What a request led to, so that a repeat is known to be done before any model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hasten.engines.tensorrt.hashes import content_key
from hasten.engines.tensorrt.manifest import Manifest
from hasten.engines.tensorrt.store import Store
from hasten.engines.tensorrt.versions import STAGES, versions
from hasten.errors import InputError

__all__ = ["finished", "remember", "request_key"]


def request_key(model: Path | str, request: Mapping[str, Any]) -> str:
    """Of a request and the model that it names: a directory, by inodes, sizes and times of its
    files, or a shape. request: values that JSON can hold, or paths."""
    files: list[Any] = [model]
    if isinstance(model, Path):
        files = [
            (
                path.relative_to(model).as_posix(),
                *(facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns),
            )
            for path in sorted(model.rglob("*"))
            if path.is_file() and (facts := path.stat())
        ]
    plain = json.loads(json.dumps(request, default=str))
    return content_key({"request": plain, "model": files, "stages": STAGES, "versions": versions()})


def finished(store: Store, key: str, out: Path) -> Manifest | None:
    """The export in `out` if a request with this key wrote it and its files are as they were."""
    wanted = store.recall(key)
    if wanted is None or wanted.get("out") != str(out.absolute()):
        return None
    try:
        manifest = Manifest.read(out)
    except InputError:
        return None
    same = _digest(manifest) == wanted.get("manifest")
    return manifest if same and not manifest.damaged(out) else None


def remember(store: Store, key: str, out: Path, manifest: Manifest) -> None:
    """Let `finished` know what a request led to. Where it cannot be kept a repeat takes longer."""
    with suppress(OSError, InputError):
        store.remember(key, {"out": str(out.absolute()), "manifest": _digest(manifest)})


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.text().encode()).hexdigest()
