"""`hasten generate`, ended at random moments: no half-written picture, no process left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

PROGRAM = [sys.executable, "-c", "import sys; from hasten.cli import main; sys.exit(main())"]


def children_of(group: int) -> list[int]:
    """Processes of a process group, by /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_generate_ended_by_signals(tmp_path: Path, saved_model: Path) -> None:
    out = tmp_path / "kite.png"
    Image.new("RGB", (16, 16)).save(out)
    old = out.read_bytes()
    command = [*PROGRAM, "generate", "a red kite", "--model", saved_model, "--steps", "300"]
    rng = random.Random(13)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [*command, "--out", out],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(0.5, 6))
        os.kill(process.pid, number)
        code = process.wait(timeout=30)
        assert code in (-number, 130, 0)
        assert children_of(process.pid) == []
        if code == 0:
            old = out.read_bytes()
        assert out.read_bytes() == old
        with Image.open(out) as image:
            image.load()
        assert [path.name for path in tmp_path.iterdir()] == ["kite.png"]
