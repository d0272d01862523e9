"""The command, from its options to its files, with real rows on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.recipe import Recipe
from hasten.results_file import read_results
from studies.peers import run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "pruna"], "no row is called 'pruna'"),
        (["--rows", "hasten"], "name a preset"),
        (["--sizes", "100"], "not multiples of 16"),
        (["--rounds", "0"], "1 or more"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--model", "shape:nothing"], "unknown shape"),
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
    for size in (32, 64):
        results = read_results(tmp_path / str(size) / "results.json")
        base, own = results.rows
        assert results.workload.width == size
        assert (base.role, own.role) == ("baseline", "recipe")
        assert (base.status, own.status) == ("ok", "ok")
        assert base.steps_computed is not None
        assert own.steps_computed is not None
        assert (base.steps_computed.max, own.steps_computed.max) == (6, 4)
        assert own.extra["latent distance"] > 0
        assert Recipe.from_toml(own.toml or "").cache is not None
        assert "hasten:cache" in (tmp_path / str(size) / "table.md").read_text()
        assert (tmp_path / str(size) / "report.html").is_file()
