"""`hasten calibrate`: bad input is refused at once; what is written is a recipe that works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten.cli import main
from hasten.prompts import prompt_hash, read_prompts
from hasten.recipe import ScheduleCache, read_recipe


def test_every_fault_at_once_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "schedule.json"
    arguments = ["--budget", "60", "--limit", "0", "--seed", "-1", "--out", str(out)]
    arguments += ["--objective", "ssim", "--climb", "-1"]
    assert main(["calibrate", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 6
    assert [line.startswith("fix: ") for line in lines] == [False, True] * 6
    parts = ("budget = 60", "limit = 0", "seed = -1", "not a .toml", "objective =", "climb = -1")
    for part in parts:
        assert any(part in line for line in errors)
    assert list(tmp_path.iterdir()) == []


def test_too_few_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    out = tmp_path / "schedule.toml"
    assert main(["calibrate", "--budget", "5", "--prompts", str(prompts), "--out", str(out)]) == 2
    assert "2 prompts are too few" in capsys.readouterr().err
    assert not out.exists()


def test_a_schedule_is_written(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.toml"
    arguments = ["--model", str(saved_model), "--budget", "3", "--limit", "2", "--out", str(out)]
    assert main(["calibrate", *arguments, "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(out)
    cache = read_recipe(out).cache
    assert isinstance(cache, ScheduleCache)
    assert len(cache.compute) == 3
    assert cache.expected_error == pytest.approx(told["error"], abs=1e-5)
    defaults = read_prompts("general-calibration", limit=10)
    assert cache.prompts == tuple(map(prompt_hash, defaults)), "of the default set"
    assert list(tmp_path.iterdir()) == [out]


def errors_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_a_schedule_needs_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "30", "--out", str(tmp_path / "made.toml")]
    assert main(["calibrate", *arguments]) == 2
    error, fix = capsys.readouterr().err.splitlines()
    assert "--budget is missing" in error
    assert fix == "fix: --budget 10 computes a third of the 30 steps"


def test_scales_need_a_recipe_that_quantises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.toml"
    assert main(["calibrate-scales", "--recipe", "cache", "--out", str(out)]) == 2
    (error,) = errors_of(capsys)
    assert "quantises nothing" in error
    assert list(tmp_path.iterdir()) == []


def test_the_old_spelling_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--recipe", "fp8", "--activations", "--limit", "4"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: `hasten calibrate --activations` is a command of its own, "
        "`hasten calibrate-scales`",
        "fix: hasten calibrate-scales --recipe fp8 --limit 4",
    ]


def test_every_fault_of_static_scales_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "nope", "--limit", "0", "--seed", "-1"]
    arguments += ["--out", str(tmp_path / "static.json"), "--prompts", str(tmp_path / "none.txt")]
    assert main(["calibrate-scales", *arguments]) == 2
    errors = errors_of(capsys)
    for part in ("'nope'", "limit = 0", "seed = -1", "not a .toml", "none.txt"):
        assert any(part in line for line in errors)
    assert len(errors) == 5
    assert list(tmp_path.iterdir()) == []


def test_static_scales_are_written(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompts = tmp_path / "mine.toml", tmp_path / "prompts.txt"
    prompts.write_text("a red kite\na kite\n")
    arguments = ["--model", str(saved_model), "--prompts", str(prompts)]
    arguments += ["--steps", "2", "--device", "cpu", "--dtype", "float32", "--out", str(out)]
    assert main(["calibrate-scales", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    recipe = read_recipe(out)
    assert (told["path"], told["recipe"], told["prompts"]) == (str(out), "fp8-static", 2)
    assert recipe.name == "mine", "a file's name is the recipe's"
    assert recipe.quantize is not None
    assert recipe.quantize.amax == told["amax"]
    assert recipe.fuse is not None, "the rest of the recipe is kept"
    assert sorted(tmp_path.iterdir()) == [out, prompts]
    assert main(["calibrate-scales", *arguments]) == 0
    assert "static scales of 34 linears, from 2 steps of 2 prompts" in capsys.readouterr().out
