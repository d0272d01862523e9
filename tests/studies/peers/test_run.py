"""The command, from its options to its files, with real rows on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studies.peers import run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "pruna"], "no row is called 'pruna'"),
        (["--rows", "hasten"], "name a preset"),
        (["--sizes", "100"], "not multiples of 16"),
        (["--rounds", "0"], "1 or more"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--model", "shape:nothing"], "no shape is called"),
    ],
)
def test_bad_options_are_one_line_and_start_nothing(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    with pytest.raises(SystemExit, match=says):
        run.main([*device, *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rows_are_measured_on_a_cpu(saved_model: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--sizes", "32", "64", "--steps", "6", "--rounds", "1"]
    run.main(
        [*options, "--model", str(saved_model), "--out", str(tmp_path), "--rows", "hasten:cache"]
    )
    results = json.loads((tmp_path / "peers.json").read_text())
    base, own = results["rows"]
    assert results["finished"]
    assert (base["status"], own["status"]) == ("ok", "ok")
    assert base["sizes"]["64"]["computed"] == 6
    assert own["sizes"]["64"]["computed"] == 4
    assert base["sizes"]["32"]["finite"]
    assert own["sizes"]["32"]["latent_distance"] > 0
    assert 'kind = "interval"' in own["recipe"]["hasten.optimize"]
    assert "hasten:cache" in (tmp_path / "peers.md").read_text()
