"""One row measured in this process: with a real small pipeline, and with every way to fail."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from hasten.benchmark import row as row_module
from hasten.benchmark.job import Job
from hasten.benchmark.plan import settings_of
from hasten.benchmark.render import _learned_on, denoise_seconds, weights_of
from hasten.benchmark.row import measure
from hasten.recipe import BudgetCache, Recipe, ScheduleCache, resolve
from tests.benchmark import fake_engine, small_engine
from tests.benchmark.plans import FAKE, make_plan, odd


@pytest.fixture(autouse=True)
def _dynamo_as_it_was() -> Iterator[None]:
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield


def job_for(folder: Path, recipe: Recipe, references: tuple[str, ...] = (), **options: Any) -> Job:
    return Job(
        row=recipe.name,
        role="baseline" if recipe.name == "baseline" else "recipe",
        toml=recipe.to_toml(),
        workload=make_plan([], max_sequence_length=8, **options).workload,
        device="cpu",
        images=str(folder / "images"),
        floats=str(folder / recipe.name),
        keep_floats=not references,
        references={name: str(folder / name) for name in references},
        outcome=str(folder / "outcome.json"),
        engine=FAKE,
    )


def quiet(*_: Any) -> None:
    """Progress nobody hears."""


def outcome(folder: Path, recipe: Recipe, **options: Any) -> Any:
    return row_module._outcome(job_for(folder, recipe, **options), quiet)


def test_a_real_pipeline_cached_and_scored(tmp_path: Path) -> None:
    heard: list[str] = []
    engine: ModuleType = small_engine
    baseline = measure(job_for(tmp_path, resolve("baseline")), engine, quiet).row
    cached = measure(
        job_for(tmp_path, resolve("cache"), ("baseline",)), engine, lambda *m: heard.append(m[0])
    ).row
    assert baseline.quality == ()
    assert baseline.steps_computed is not None
    assert cached.steps_computed is not None
    assert (baseline.steps_computed.mean, cached.steps_computed.max) == (6, 4)
    (quality,) = cached.quality
    assert quality.lpips is not None
    assert 0 < quality.lpips < 1
    assert baseline.weights_bytes == cached.weights_bytes
    assert len(list((tmp_path / "baseline").iterdir())) == 2
    assert not (tmp_path / "cache").exists()
    with Image.open(tmp_path / "images" / "001.png") as picture:
        assert picture.size == (48, 32)
    assert list(dict.fromkeys(heard)) == [
        "load",
        "first image",
        "warm up",
        "render",
        "time the transformer",
        "score against baseline",
    ]
    assert "random weights" in " ".join(baseline.notes)


def test_a_schedule_of_another_model_is_used_by_force_alone(tmp_path: Path) -> None:
    schedule = ScheduleCache(steps=6, compute=(0, 3), fingerprint="00ff00ff00ff00ff")
    job = job_for(tmp_path, Recipe(name="foreign", cache=schedule))
    job = job.model_copy(update={"engine": small_engine.__name__})
    refused = row_module._outcome(job, quiet).row
    assert refused.status == "unsupported"
    assert "learned on another model" in str(refused.reason)
    assert "--force" in str(refused.reason)
    assert not any("by force" in note for note in refused.notes)
    forced = row_module._outcome(job.model_copy(update={"force": True}), quiet).row
    assert (forced.status, forced.reason) == ("ok", None)
    assert forced.steps_computed is not None
    assert forced.steps_computed.max == 2
    assert "schedule learned on another model, used by force" in forced.notes


def test_numbers_come_from_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("hasten.benchmark.timer.perf_counter", lambda: float(next(ticks) ** 2))
    found = measure(job_for(tmp_path, resolve("cache"), limit=3), fake_engine, quiet).row
    # Two ticks each: load 0 to 1, first image 4 to 9, prompts 16 to 25, 36 to 49, 64 to 81.
    assert found.setup_seconds == 1
    assert found.first_image_seconds == 5
    assert found.seconds_per_image is not None
    assert found.seconds_per_image.samples == (9, 13, 17)
    # Sampling steps alone: 100 to 121, which is over five seconds and so not repeated.
    assert found.transformer_ms_per_step == 1000 * 21 / 6
    assert found.weights_bytes == (8 * 4 + 4) * 4


@pytest.mark.parametrize(
    ("seconds", "median"), [((1.0, 3.5, 2.0), 2.0), ((3.0, 4.0), 3.5), ((9.0,), 9.0)]
)
def test_sampling_is_repeated_until_five_seconds_are_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], median: float
) -> None:
    job = job_for(tmp_path, resolve("baseline"))
    left = list(seconds)
    monkeypatch.setattr("hasten.benchmark.render.timed", lambda *_: (None, left.pop(0)))
    settings = settings_of(Recipe(), job.workload)
    found = denoise_seconds(
        fake_engine.load_subject(job), job.workload.prompts[0], settings, torch.device("cpu")
    )
    assert found == median
    assert left == []


def test_an_exception_is_one_line_and_the_log_has_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = outcome(tmp_path, odd("fail"))
    assert (found.row.status, found.row.reason) == ("failed", "ValueError: first line")
    assert found.refusal is None
    assert "Traceback" in capfd.readouterr().err


def test_unsupported_has_its_reason_and_fix(tmp_path: Path) -> None:
    found = outcome(tmp_path, odd("unsupported"))
    assert found.row.status == "unsupported"
    assert found.row.reason == "no compiler; fix: install one"


def test_a_picture_that_is_not_finite_fails(tmp_path: Path) -> None:
    found = outcome(tmp_path, odd("nan"))
    assert (found.row.status, found.row.reason) == (
        "failed",
        "image 0 has values that are not finite",
    )


def test_the_recompile_limit_fails_instead_of_running_uncompiled(tmp_path: Path) -> None:
    found = outcome(tmp_path, odd("recompile"))
    assert found.row.status == "failed"
    assert "recompile limit" in found.row.reason


def test_a_model_that_cannot_be_had_is_a_refusal(tmp_path: Path) -> None:
    found = outcome(tmp_path, odd("x"), model="owner/missing")
    assert found.refusal.kind == "ModelError"
    assert found.refusal.faults == ("owner/missing: no such model",)


def test_random_weights_and_missing_references_are_reasons(tmp_path: Path) -> None:
    job = job_for(tmp_path, odd("random"), ("baseline",))
    (quality,) = measure(job, fake_engine, quiet).row.quality
    assert (quality.n, quality.reason) == (0, "random weights: image quality is meaningless")
    job = job_for(tmp_path, odd("x")).model_copy(update={"references": {"baseline": None}})
    (quality,) = measure(job, fake_engine, quiet).row.quality
    assert quality.reason == "the reference row baseline has no images"


def test_nobody_waiting_ends_the_row(tmp_path: Path) -> None:
    def progress(*_: Any) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        row_module._outcome(job_for(tmp_path, odd("x")), progress)


@pytest.mark.parametrize(
    ("recipe", "note"),
    [
        ("learned on the first", "its schedule was learned on 1 of these 2 prompts"),
        ("learned on others", "its schedule was learned on none of these 2 prompts"),
        ("learned on unknown", "its schedule does not record the prompts that it was learned on"),
    ],
)
def test_a_learned_schedule_says_which_prompts_taught_it(
    tmp_path: Path, recipe: str, note: str
) -> None:
    found = measure(job_for(tmp_path, odd(recipe)), fake_engine, quiet).row
    assert note in found.notes
    plain = measure(job_for(tmp_path, resolve("baseline")), fake_engine, quiet).row
    assert not any("schedule" in text for text in plain.notes)


def test_the_bundled_models_own_schedule_is_found_by_its_budget(saved_model: Path) -> None:
    from hasten.models import load_pipeline

    pipe = load_pipeline("tiny", device="cpu")
    assert _learned_on(Recipe(cache=BudgetCache(budget=17)), pipe, 50) is not None
    assert _learned_on(resolve("cache"), pipe, 50) is None
    other = load_pipeline(str(saved_model), device="cpu")
    assert _learned_on(Recipe(cache=BudgetCache(budget=17)), other, 50) is None


def test_other_weights_than_earlier_rows_had_end_the_benchmark(tmp_path: Path) -> None:
    job = job_for(tmp_path, resolve("baseline")).model_copy(update={"weights": "ffff"})
    found = row_module._outcome(job, quiet)
    assert found.row.status == "failed"
    assert found.refusal is not None
    assert found.refusal.final
    assert "differ from those of earlier rows" in found.refusal.faults[0]
    assert "--overwrite" in found.refusal.fix


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2"])
def test_weights_of_any_component_count(make_pipe: Any, part: str) -> None:
    pipe = make_pipe()
    before = weights_of(pipe)
    assert before is not None
    assert weights_of(make_pipe()) == before
    with torch.no_grad():
        next(getattr(pipe, part).parameters()).add_(1)
    assert weights_of(pipe) not in (None, before)
    getattr(pipe, part).to("meta")
    assert weights_of(pipe) is None


def test_settings_of_the_scheduler_count(make_pipe: Any) -> None:
    pipe = make_pipe()
    before = weights_of(pipe)
    pipe.scheduler.register_to_config(shift=4.0)
    assert weights_of(pipe) not in (None, before)


def test_a_full_disk_is_a_reason_to_end_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hasten.benchmark.render.write_png", full)
    found = outcome(tmp_path, resolve("baseline"))
    assert found.refusal.final
    assert "No space left on device" in found.refusal.faults[0]
