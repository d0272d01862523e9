"""What the benchmark of exports makes of its measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")

from studies import tensorrt

RESULTS = Path("studies/results/tensorrt/cpu-2-cores.json")


def depth(blocks: int, **changed: Any) -> dict[str, Any]:
    """A row whose figures lie on lines: 1 GB and 2 s of export a block, 3 s and 2.5 GB a GB."""
    size = blocks * 10**9
    measured = {"seconds": 5.0 + 2 * blocks, "bytes_before": 0, "peak_bytes": 10**9}
    built = {"seconds": 3.0 * blocks, "peak_bytes": int(2.5 * size), "bytes": size, "sha256": ""}
    return {
        "double": blocks // 2,
        "single": blocks // 2,
        "others": 0.0,
        "graph_bytes": size,
        "streamed": measured,
        "naive": {**measured, "peak_bytes": 2**31},
        "verified": None,
        "built": built,
        **changed,
    }


def command(precision: str, **changed: Any) -> dict[str, Any]:
    error = None if precision == "bf16" else 0.05
    size = {"height": 8, "width": 12, "whole": 0.001, "control": error, "unquantised": error}
    stage = {"name": "export", "seconds": 7.0, "peak_bytes": 2**30, "cached": False}
    return {
        "precision": precision,
        "others": 0.0,
        "seconds": 21.0,
        "repeat_seconds": 0.5,
        "rebuilt_is_identical": True,
        "engine_bytes": 23_100_000,
        "stages": [stage],
        "verification": {"sizes": [{**size, "blocks": {"a": 0.002, "b": 0.001}}]},
        **changed,
    }


def test_points_on_a_line_are_carried_on() -> None:
    full = tensorrt.extrapolated([depth(2), depth(4), depth(8)], 10 * 10**9, 57)
    assert full["export_seconds"]["value"] == pytest.approx(5 + 2 * 57)
    assert full["build_seconds"]["value"] == pytest.approx(30)
    assert full["build_peak_bytes"]["value"] == pytest.approx(25e9)
    assert full["engine_bytes"]["slope"] == pytest.approx(1)
    assert full["export_peak_bytes"]["value"] == pytest.approx(1e9)
    assert full["build_seconds"]["largest_residual"] == pytest.approx(0, abs=1e-9)


def test_a_point_off_the_line_shows() -> None:
    off = depth(4)
    off["built"] = {**off["built"], "seconds": 15.0}
    full = tensorrt.extrapolated([depth(2), off, depth(8)], 10 * 10**9, 57)
    assert full["build_seconds"]["largest_residual"] > 1


def test_tables_have_a_line_a_row_and_mark_the_busy_ones() -> None:
    busy = command("fp8", others=0.9, rebuilt_is_identical=False)
    rows = [depth(2), depth(4), depth(8)]
    full = tensorrt.extrapolated(rows, 10 * 10**9, 57)
    text = tensorrt.tables(
        {"commands": {"rows": [command("bf16"), busy]}, "depths": {"rows": rows, "full": full}}
    )
    assert "| bf16 | 7.0 s, 1.00 GiB | 21.0 | 0.5 | 23.1 | identical |" in text
    assert "| fp8* |" in text
    assert "DIFFERS" in text
    assert "| bf16 | 8×12 | 1.0e-03 | 2.0e-03 | – | – |" in text
    assert "| 1 + 1 blocks | 2.00 | 9.0 | 0.93 | 9.0 | 2.00 | – | – | 6.0 | 4.66 | 2.00 |" in text
    assert "| export | 119 s (2.0 s a block), 0.9 GiB |" in text
    assert "other processes ran" in text
    for table in text.split("\n\n")[:-1]:
        columns = {line.count("|") for line in table.splitlines()}
        assert len(columns) == 1
    assert "other processes" not in tensorrt.tables({"commands": {"rows": [command("bf16")]}})


def test_what_is_committed_can_be_read_and_holds() -> None:
    """The tables of the docs, and the bars that they are there to show."""
    done = subprocess.run(
        [sys.executable, "-m", "studies.tensorrt", "--tables", str(RESULTS)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| FLUX.1-dev in FP8, 57 blocks, extrapolated | |" in done.stdout
    result = json.loads(RESULTS.read_text("utf-8"))
    assert result["schema"] == tensorrt.SCHEMA
    for row in result["commands"]["rows"]:
        if row["others"] <= tensorrt.BUSY:
            assert row["seconds"] < 60
            assert row["repeat_seconds"] <= 5
        assert row["rebuilt_is_identical"]
    for row in result["depths"]["rows"]:
        assert row["built"]["peak_bytes"] < 16 * tensorrt.GIB
    for row in result["depths"]["rows"][1:]:  # in the first the packages take more than the weights
        assert row["streamed"]["peak_bytes"] < 0.5 * row["naive"]["peak_bytes"]
