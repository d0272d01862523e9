"""`hasten calibrate`: bad input is refused at once; what is written is a recipe that works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten.cli import main
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
    assert [line.startswith("fix: ") for line in lines] == [False] * 6 + [True]
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


@pytest.mark.slow
def test_a_schedule_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.toml"
    arguments = ["--steps", "6", "--budget", "3", "--limit", "2", "--out", str(out)]
    assert main(["calibrate", *arguments, "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(out)
    cache = read_recipe(out).cache
    assert isinstance(cache, ScheduleCache)
    assert len(cache.compute) == 3
    assert cache.expected_error == pytest.approx(told["error"], abs=1e-5)
    assert list(tmp_path.iterdir()) == [out]
