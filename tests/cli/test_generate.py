"""`hasten generate` on the real engine and a small random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import hasten
from hasten.log import logger
from hasten.recipe import Recipe, resolve
from tests.cli.conftest import Run

SMALL = ("--size", "32x32", "--steps", "6", "--max-sequence-length", "8")
pytestmark = pytest.mark.usefixtures("small_model")


def test_a_picture_and_one_line_about_it(run: Run, tmp_path: Path) -> None:
    ended = run("generate", "a red kite", *SMALL, "--out", "kite.png")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert ended.out.startswith("kite.png: 32x32, recipe cache, 4 of 6 steps computed, ")
    assert len(ended.out.splitlines()) == 1
    with Image.open(tmp_path / "kite.png") as image:
        assert image.size == (32, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["kite.png"]


def test_the_png_says_how_to_make_it_again(run: Run, tmp_path: Path) -> None:
    prompt = "ein roter Drache, 紅色風箏 🪁\nat dusk"
    run("generate", prompt, *SMALL, "--seed", "7", "--recipe", "cache")
    with Image.open(tmp_path / "hasten.png") as image:
        texts = image.text
    assert texts["prompt"] == prompt
    assert Recipe.from_toml(texts["recipe"]) == resolve("cache")
    facts = json.loads(texts["hasten"])
    assert facts["seed"] == 7
    assert facts["steps"] == 6
    assert facts["model"] == "tiny"
    assert facts["versions"]["torch"]
    assert facts["versions"]["hasten"]


def test_the_seed_decides_the_picture(run: Run, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("generate", "x", *SMALL, "--seed", seed, "--out", f"{name}.png")
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a == b
    assert a != c


def test_options_win_over_the_recipe_and_the_recipe_over_the_model(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(
        '[sampling]\nsteps = 3\nsize = "48x32"\nguidance = 2.0\nmax_sequence_length = 8\n'
    )
    ended = run("generate", "x", "--recipe", "mine.toml", "--guidance", "0", "--json")
    result = json.loads(ended.out)
    assert (result["width"], result["height"], result["steps"]) == (48, 32, 3)
    assert result["guidance"] == 0
    assert result["recipe"] == "mine"
    assert result["steps_computed"] == 3
    assert result["load_seconds"] >= 0
    assert result["image_seconds"] > 0
    assert result["path"] == "hasten.png"


def test_verbose_prints_the_summary(run: Run) -> None:
    ended = run("generate", "x", *SMALL, "--verbose")
    assert "recipe cache" in ended.out.splitlines()[1]


def test_stages_of_an_export_are_lines_on_stderr(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = hasten.optimize

    def exporting(*given: Any, **options: Any) -> Any:
        logger.debug("calibrating: prompt 1 of 4")
        logger.info("calibrate     9.0 s")
        return optimize(*given, **options)

    monkeypatch.setattr("hasten.apply.optimize", exporting)
    assert run("generate", "x", *SMALL).err == "calibrate     9.0 s\n"


FOREIGN = (
    '[cache]\nkind = "schedule"\nsteps = 6\ncompute = [0, 3]\nfingerprint = "00ff00ff00ff00ff"\n'
)


def test_a_schedule_of_another_model_needs_force(run: Run, tmp_path: Path) -> None:
    (tmp_path / "foreign.toml").write_text(FOREIGN)
    asked = ("generate", "x", *SMALL, "--recipe", "foreign.toml", "--verbose")
    ended = run(*asked)
    assert ended.code == 1
    assert ended.out == ""
    assert "learned on another model (00ff00ff00ff00ff" in ended.errors[0]
    assert "--force" in ended.fixes[0]
    assert "hasten calibrate" in ended.fixes[0]
    assert not (tmp_path / "hasten.png").exists()
    ended = run(*asked, "--force")
    assert ended.code == 0, ended.err
    assert "2 of 6 steps computed" in ended.out
    assert "note: schedule learned on another model, used by force" in ended.out


def test_an_interrupted_run_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(self: Any, done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("hasten.cli.terminal.ProgressBar.at", at)
    assert run("generate", "x", *SMALL).code == 130
    assert list(tmp_path.iterdir()) == []
