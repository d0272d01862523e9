"""A model directory in the layout of huggingface_hub's cache: refs, blobs, and links to them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_hub_cache(cache: Path, repo: str, model: Path, commit: str = COMMIT) -> Path:
    """Write `model` into `cache` as the main branch of `repo`, and return its snapshot."""
    place = cache / f"models--{repo.replace('/', '--')}"
    for folder in ("refs", "blobs"):
        (place / folder).mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    snapshot = place / "snapshots" / commit
    for source in sorted(path for path in model.rglob("*") if path.is_file()):
        link = snapshot / source.relative_to(model)
        blob = place / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        shutil.copyfile(source, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot
