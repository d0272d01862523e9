"""Programs with a disk of their own mounted, in a name space that ends with them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def with_mount(
    options: str, where: Path, program: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """How a Python program ended that saw an empty disk at `where`; skips where this machine lets
    nobody mount one. options: of mount, `rw` or `ro`."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare here")
    mounted = [unshare, "--mount", "--map-root-user"]
    if not _ends_well(mounted, where):
        mounted = [unshare, "--mount"]
    if not _ends_well(mounted, where):
        pytest.skip("nothing can be mounted here")
    script = f'mount -t tmpfs -o {options} none "$1" && shift && exec "$@"'
    command = [*mounted, "sh", "-c", script, "sh", str(where), sys.executable, "-c", program]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def _ends_well(mounted: list[str], where: Path) -> bool:
    trial = [*mounted, "mount", "-t", "tmpfs", "none", str(where)]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0
