"""Rows of a race as the product's results."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from studies.peers.record import IN_TURNS, Record, distance, recipe_toml
from studies.peers.results import all_results, write_all, write_reports
from studies.peers.workload import Workload

from hasten.recipe import Recipe
from hasten.results import Environment
from hasten.results_file import read_results

GIB = 2**30
WORKLOAD = Workload("shape:flux.1-dev", "cuda", "bfloat16", (512,), 50, 2, 512)
ENVIRONMENT = Environment(
    device="cuda",
    torch="2.11",
    diffusers="0.42",
    hasten="0",
    date="2026-11-27",
    packages={"torchao": "0.18.0"},
)


def record(kind: str, name: str, group: int | None, seconds: float, computed: int = 50) -> Record:
    made = Record.new(kind, name, [512])
    made.group, made.load_seconds, made.setup_seconds, made.held_bytes = group, 1.0, 3.0, GIB // 2
    made.timings[512].first_image_seconds = seconds + 9
    sample = {
        "seconds": seconds,
        "loop_seconds": seconds - 0.5,
        "computed": computed,
        "peak_bytes": int(seconds * GIB),
        "finite": True,
    }
    made.add(512, sample)
    made.add(512, sample)
    return made


@pytest.fixture
def records() -> list[Record]:
    refused = Record.new("flux-fast", "flux-fast", [512])
    refused.status, refused.reason = "too slow to set up", "given up 300 s after loading"
    return [
        record("diffusers", "diffusers", 0, 4.0),
        record("cache-dit-eager", "cache-dit-eager:18", 0, 2.0, 18),
        record("diffusers", "diffusers", 1, 3.0),
        record("hasten", "hasten:balanced", 1, 0.5, 18),
        refused,
    ]


def test_ratios_are_to_the_base_of_the_rows_own_group(records: list[Record]) -> None:
    found = all_results(records, WORKLOAD, ENVIRONMENT, "command")
    assert list(found) == ["512", "512-group-1"]
    _, peer = found["512"].rows
    _, own, refused = found["512-group-1"].rows
    assert (peer.role, peer.speedup) == ("peer", pytest.approx(2))
    assert (own.role, own.speedup) == ("recipe", pytest.approx(6))
    assert peer.transformer_ms_per_step == pytest.approx(30)
    assert peer.extra == {"load s": 1.0, "held GiB": 0.5}
    assert (peer.setup_seconds, peer.first_image_seconds) == (4.0, 11.0)
    assert (refused.status, refused.reason) == (
        "failed",
        "too slow to set up: given up 300 s after loading",
    )


def test_files_and_reports_are_the_products(records: list[Record], tmp_path: Path) -> None:
    found = all_results(records, WORKLOAD, ENVIRONMENT, "python -m studies.peers.run")
    write_all(found, tmp_path)
    write_reports(found, tmp_path)
    assert read_results(tmp_path / "512" / "results.json") == found["512"]
    text = (tmp_path / "512-group-1" / "table.md").read_text()
    assert "too slow to set up" in text
    assert "torchao 0.18.0" in text
    assert "python -m studies.peers.run" in text
    assert (tmp_path / "512" / "speedup.png").is_file()


def test_a_run_that_has_only_begun_can_be_written(tmp_path: Path) -> None:
    records = [Record.new("diffusers", "diffusers", [512]), Record.new("hasten", "hasten:a", [512])]
    write_all(all_results(records, WORKLOAD, ENVIRONMENT, ""), tmp_path)
    rows = read_results(tmp_path / "512" / "results.json").rows
    assert [row.reason for row in rows] == ["stopped: never begun"] * 2


def test_images_that_are_not_finite_are_noted(records: list[Record]) -> None:
    records[1].timings[512].samples[0]["finite"] = False
    assert records[1].row(512, 50).notes == (IN_TURNS, "its images are not finite")


def test_settings_are_toml_and_summaries_its_comments(records: list[Record]) -> None:
    recipe = Recipe.from_dict({"cache": {"kind": "interval", "interval": 2}}).to_toml()
    own = recipe_toml({"hasten.optimize": recipe, "compiler settings changed": {}})
    assert own == recipe
    peer = recipe_toml({"attention": {"chosen": "native", "x": [(1, None)]}, "mode": None})
    assert tomllib.loads(peer)["settings"] == {"attention": {"chosen": "native", "x": [[1]]}}
    records[1].settings, records[1].summary = peer, "steps:\n  18 computed"
    toml = records[1].row(512, 50).toml or ""
    assert toml.endswith("# steps:\n#   18 computed")
    assert tomllib.loads(toml) == tomllib.loads(peer)


def test_distance_is_relative_to_the_base() -> None:
    assert distance([3.0, 4.0], [3.0, 4.0]) == 0
    assert distance([0.0, 0.0], [3.0, 4.0]) == pytest.approx(1)
    assert distance([1.0], [0.0]) is None
    assert distance([1.0, 2.0], [1.0]) is None
