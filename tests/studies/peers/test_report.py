"""The table says what the results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from studies.peers.record import distance, new_row, summarize
from studies.peers.report import markdown, write_report

GIB = 2**30


def row(name: str, package: str, group: int, seconds: float, computed: int = 50) -> dict[str, Any]:
    made = new_row(name, package, group, [512])
    sample = {
        "seconds": seconds,
        "loop_seconds": seconds - 0.5,
        "computed": computed,
        "peak_bytes": int(seconds * GIB),
        "finite": True,
    }
    made["sizes"]["512"].update(summarize([sample, sample], 50), first_image_seconds=seconds + 9)
    made.update(status="ok", reason=None, setup_seconds=3.0, held_bytes=GIB // 2)
    return made


@pytest.fixture
def results() -> dict[str, Any]:
    refused = new_row("flux-fast", "peer", None, [512])
    refused.update(status="too slow to set up", reason="given up 300 s after loading")
    return {
        "workload": {
            "model": "shape:flux.1-dev",
            "dtype": "bfloat16",
            "steps": 50,
            "rounds": 2,
            "sizes": [512],
        },
        "environment": {
            "torch": "2.11", "gpu": "Some GPU", "packages": {"torchao": "0.18.0", "mslk": None}
        },
        "finished": True,
        "rows": [
            row("diffusers", "peer", 0, 4.0),
            row("cache-dit-eager:18", "peer", 0, 2.0, 18),
            row("diffusers", "peer", 1, 3.0),
            row("cache-dit-fp8-compile:18", "peer", 1, 1.0, 18),
            row("hasten:balanced", "hasten", 1, 0.5, 18),
            row("hasten:fp8", "hasten", 1, 1.5),
            refused,
        ],
    }  # fmt: skip


def test_ratios_are_to_the_base_of_the_rows_own_group(results: dict[str, Any]) -> None:
    text = markdown(results).partition("## First images")[0]
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line[:2] == "| "}
    assert "| 2.00× | 30.0 | 0.43 |" in lines["cache-dit-eager:18"]
    assert "| 6.00× | 0.0 |" in lines["hasten:balanced"]
    assert "| 3.000 | 3.000–3.000 | 2 | 1.00× |" in lines["diffusers (group 1)"]
    assert "| 2.0 + 0.5 | 0.56 |" in lines["cache-dit-eager:18"]


def test_hasten_is_compared_with_the_fastest_peer_of_as_many_steps(
    results: dict[str, Any],
) -> None:
    text = markdown(results)
    assert "hasten:balanced, 18 computed: 2.00 times as fast as cache-dit-fp8-compile:18" in text
    assert "hasten:fp8, 50 computed: 2.00 times as fast as diffusers" in text


def test_what_is_missing_is_said(results: dict[str, Any]) -> None:
    text = markdown(results)
    assert "- flux-fast: too slow to set up: given up 300 s after loading" in text
    assert "cut off" not in text
    assert "torchao 0.18.0. Not installed: mslk." in text
    assert "cut off" in markdown({**results, "finished": False})


def test_first_images_are_counted_from_loaded_weights(results: dict[str, Any]) -> None:
    results["rows"][4]["warm_start"] = {
        "setup_seconds": 1.0, "first_image_seconds": {"512": 2.5}
    }  # fmt: skip
    text = markdown(results)
    assert "| hasten:balanced | 3.0 | 12.5 | 3.5 |" in text
    assert text.count("| diffusers | 3.0 |") == 1  # one start, however many groups


def test_the_table_is_written_beside_the_results(results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(json.dumps(results))
    assert write_report(path) == (tmp_path / "peers.md").read_text()


def test_distance_is_relative_to_the_base() -> None:
    assert distance([3.0, 4.0], [3.0, 4.0]) == 0
    assert distance([0.0, 0.0], [3.0, 4.0]) == pytest.approx(1)
    assert distance([1.0], [0.0]) is None
    assert distance([1.0, 2.0], [1.0]) is None
