"""`hasten layers`: the table, the JSON, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hasten.machine import machine
from hasten.recipe import Quantize
from tests.cli.conftest import Run

INT8 = '[quantize]\nscheme = "int8"\nskip = ["*.to_q"]\n'


@pytest.fixture
def int8(tmp_path: Path) -> str:
    (tmp_path / "int8.toml").write_text(INT8)
    return "int8.toml"


@pytest.mark.usefixtures("small_model")
def test_the_table_begins_with_the_worst(run: Run, int8: str) -> None:
    ended = run("layers", "--recipe", int8, "--device", "cpu")
    assert (ended.code, ended.err) == (0, "")
    first, _, head, *rows = ended.out.splitlines()
    assert first == (
        "30 linears of tiny in int8, one scale per row, against float32 on cpu: "
        "4 steps of one image"
    )
    assert head.split() == ["linear", "inputs", "outputs", "SQNR", "dB", "error"]
    ratios = [float(row.split()[3]) for row in rows[:20]]
    assert ratios == sorted(ratios)
    assert rows[20] == "and 10 with less error (--json lists all)"
    assert "median" in ended.out
    assert not any(row.split()[0].endswith("to_q") for row in rows[:20])


@pytest.mark.usefixtures("small_model")
def test_json_has_every_layer(run: Run, int8: str) -> None:
    ended = run("layers", "--recipe", int8, "--json", "--device", "cpu")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["quantize"] == Quantize(scheme="int8", skip=("*.to_q",)).model_dump(mode="json")
    assert (found["model"], found["recipe"], found["steps"]) == ("tiny", "int8", 4)
    assert len(found["layers"]) == 30
    layer = found["layers"][0]
    assert set(layer) == {"name", "inputs", "outputs", "sqnr_db", "calls"}
    assert layer["calls"] == 4
    assert layer["sqnr_db"] > 25


@pytest.mark.usefixtures("small_model")
def test_outliers_become_a_skip_list(run: Run, int8: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.quantization.report.OUTLIER_DB", 0.0)
    ended = run("layers", "--recipe", int8, "--device", "cpu")
    suggested = ended.out.splitlines()[-1].strip().removeprefix("skip = ")
    names = json.loads(suggested)
    assert names[0] == "*.to_q"
    assert len(names) > 10
    Path(int8).write_text(f"{INT8}[fuse]\n")
    fused = run("layers", "--recipe", int8, "--device", "cpu")
    assert fused.out.splitlines()[-1].startswith("with [fuse], skip a whole block")


def test_every_fault_at_once(run: Run) -> None:
    ended = run("layers", "--recipe", "cache", "--model", "no/such/model")
    assert ended.code == 2
    assert len(ended.errors) == 2
    assert "quantises nothing" in ended.errors[0]
    assert "no such model directory" in ended.errors[1]
    assert len(ended.fixes) == 2


def test_a_scheme_that_cannot_run_here_names_one_that_can(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = dataclasses.replace(machine(), fp8_on_cpu=False)
    monkeypatch.setattr("hasten.machine.machine", lambda: without)
    ended = run("layers", "--device", "cpu")
    assert ended.code == 1
    assert "no FP8 product on this CPU" in ended.errors[0]
    assert "emulate = true" in ended.fixes[0]


@pytest.mark.usefixtures("small_model")
def test_a_pattern_that_matches_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "skip.toml").write_text('[quantize]\nscheme = "int8"\nskip = ["*.to_z"]\n')
    ended = run("layers", "--recipe", "skip.toml", "--device", "cpu")
    assert ended.code == 1
    assert "'*.to_z' matches no linear" in ended.errors[0]


def test_the_old_spelling_names_the_new_one(run: Run) -> None:
    ended = run("doctor", "--layers", "--recipe", "my recipe.toml")
    assert ended.code == 2
    assert ended.errors == [
        "error: `hasten doctor --layers` is a command of its own, `hasten layers`"
    ]
    assert ended.fixes == ["fix: hasten layers --recipe 'my recipe.toml'"]
