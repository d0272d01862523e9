"""Seconds and bytes."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from torch import nn

from hasten.benchmark.timer import peak_memory, storage_bytes, timed

CPU = torch.device("cpu")


def test_timed_returns_the_result_and_its_seconds() -> None:
    result, seconds = timed(CPU, lambda: time.sleep(0.02) or "done")
    assert result == "done"
    assert 0.02 <= seconds < 1


def test_shared_storage_counts_once() -> None:
    one, two = nn.Linear(8, 4), nn.Linear(8, 4)
    assert storage_bytes([one, two]) == 2 * (32 + 4) * 4
    two.weight = one.weight
    assert storage_bytes([one, two]) == (32 + 4 + 4) * 4
    two.register_buffer("view", one.weight.detach()[:2].view(-1))
    assert storage_bytes([one, two]) == (32 + 4 + 4) * 4
    assert storage_bytes([one.to(torch.bfloat16)]) == (32 + 4) * 2


def test_a_small_child_of_a_large_parent_is_small() -> None:
    ballast = torch.ones(2**26)  # 256 MiB, touched
    own, counted = peak_memory(CPU)
    assert own > ballast.nbytes
    assert "resident" in counted
    code = "from hasten.benchmark.timer import _peak_resident as p; print(p())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(child.stdout) < own - ballast.nbytes // 2
