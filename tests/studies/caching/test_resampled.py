"""A schedule away from where it was learned: which runs, which steps, and the table of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from studies.caching.resampled import (
    RUNS,
    carried,
    main,
    markdown,
    methods_for,
    read_runs,
    shift_at,
)
from studies.caching.results import Score, put, scored_row, workload_of
from studies.caching.workload import Frame, Model, Prompt

from hasten.passes.cache.plan import computed_steps
from hasten.recipe import Recipe
from hasten.results import Row
from studies.caching import resampled
from tests.studies.caching.test_results import ENVIRONMENT

OWN_SHIFT = 1.5
FOX = [Prompt(0, "a fox")]


def scored(name: str, lpips: float, computed: float = 14.0) -> Row:
    score = Score([lpips], [0.9], [40.0], [computed], [computed])
    return scored_row(name, {"recipe": "a.toml", "toml": ""}, score, FOX)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of one run, without its other columns."""
    rows = [scored("schedule", 0.001), scored("interval, reuse", 0.002, 13.0)]
    workload = workload_of("tiny", FOX, "The last 2", steps=40)
    put(tmp_path / "resampled-40-steps", workload, ENVIRONMENT, rows)
    return tmp_path


def test_only_the_run_it_was_learned_on_gets_its_weights() -> None:
    fitted = {run.name: carried(run.frame, OWN_SHIFT)[1] for run in RUNS}
    assert [name for name, kept in fitted.items() if kept] == [RUNS[0].name]
    assert carried(Frame(side=192), OWN_SHIFT)[1]  # the size alone changes no noise level


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_every_column_computes_as_many_steps(run: Any) -> None:
    count = len(carried(run.frame, OWN_SHIFT)[0])
    assert count == pytest.approx(run.frame.steps * 17 / 50, abs=0.5)
    for method in methods_for(run):
        for setting in method.settings(count):
            if "steps" in setting:
                assert setting["steps"] == count
            elif "kind" in setting:
                cache = Recipe.from_dict({"cache": setting}).cache
                assert cache is not None
                assert computed_steps(cache, run.frame.steps) == count


def test_flux_shift_grows_with_the_picture() -> None:
    # 256 tokens are 256×256, 4096 are 1024×1024.
    assert shift_at(256) == pytest.approx(1.6487, abs=1e-4)
    assert shift_at(1024) == pytest.approx(3.1582, abs=1e-4)


def test_a_frame_changes_steps_size_and_noise_levels() -> None:
    model = Model("tiny", frame=Frame(steps=2, side=64, shift=3.0))
    with torch.inference_mode():
        picture = model.draw(model.plain, FOX)
    assert picture.shape == (1, 3, 64, 64)
    levels = model.plain.scheduler.sigmas.tolist()
    assert levels == pytest.approx([1.0, 0.75, 0.0])
    assert model.pipeline().scheduler.config.shift == 3.0
    assert model.digest != Model("tiny").digest


def test_the_carried_steps_are_those_that_run() -> None:
    run = next(run for run in RUNS if run.name == "28 steps")
    model = Model("tiny", frame=Frame(steps=28, side=64))
    method = next(method for method in methods_for(run) if method.name == "schedule")
    call = method.apply(model.pipeline(), method.settings(0)[0])
    with torch.inference_mode():
        drawn = model.render(call, FOX, batch=1)
    assert drawn.computed == [len(carried(run.frame, OWN_SHIFT)[0])] == [10]


def test_a_table_says_where_a_column_computes_another_number(folder: Path) -> None:
    text = markdown(read_runs(folder))
    assert "| 40 steps | 14 of 40 | – | 0.00100 | 0.00200 (13) | – | – | – |" in text
    assert "| 40 steps | 14 of 40 | – | 40.0 | 40.0 (13) | – | – | – |" in text


def test_another_workload_is_not_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampled, "RUNS", [run for run in RUNS if run.key == "40-steps"])
    with pytest.raises(SystemExit, match="another workload"):
        main(["--out", str(folder), "--last", "1"])
