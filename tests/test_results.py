from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hasten.errors import InputError
from hasten.results import PromptQuality, Results, Row, summarize_quality, summarize_seconds
from hasten.results_file import read_results, write_results

COMMITTED = Path(__file__).parent.parent / "studies" / "results"

# The contract, written out by hand: every key that readers of results.json may rely on.
CONTRACT: dict[str, Any] = {
    "schema": 2,
    "workload": {
        "model": "tiny",
        "width": 512,
        "height": 512,
        "steps": 50,
        "guidance": 3.5,
        "seed": 0,
        "dtype": "bfloat16",
        "prompt_source": "bundled",
        "prompts": [{"id": 0, "text": "a red panda", "seed": 0}],
        "rounds": 3,
    },
    "environment": {
        "device": "cpu",
        "torch": "2.13.0",
        "diffusers": "0.42.1",
        "hasten": "0.1.0",
        "cuda": None,
        "commit": "abc",
        "date": "2026-11-22T21:00:00+00:00",
    },
    "rows": [
        {
            "recipe": "baseline",
            "role": "baseline",
            "rival_of": [],
            "status": "ok",
            "reason": None,
            "notes": [],
            "calibrated": None,
            "seconds_per_image": {
                "median": 2.0,
                "mean": 2.0,
                "p10": 1.2,
                "p90": 2.8,
                "n": 3,
                "samples": [1.0, 3.0, 2.0],
            },
            "speedup": 1.0,
            "transformer_ms_per_step": 40.0,
            "steps_computed": {"mean": 18, "min": 18, "max": 18},
            "setup_seconds": 0.0,
            "first_image_seconds": 0.0,
            "peak_memory_bytes": 0,
            "weights_bytes": 0,
            "quality": [
                {
                    "reference": "fp8",
                    "lpips": 0.1,
                    "ssim": 0.9,
                    "psnr": 100.0,
                    "ms_ssim": None,
                    "reason": "sides of 160 pixels or less",
                    "n": 1,
                    "per_prompt": [
                        {"id": 0, "lpips": 0.1, "ssim": 0.9, "psnr": 100.0, "ms_ssim": None}
                    ],
                }
            ],
            "images": ["images/baseline/000.png"],
            "toml": 'name = "baseline"',
        },
        {"recipe": "fp8", "role": "recipe", "status": "unsupported", "reason": "no FP8 here"},
    ],
}


def contract() -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(CONTRACT))
    return copy


def written(directory: Path, data: object) -> Path:
    path = directory / "results.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def test_the_contract_is_read_and_written_back_key_for_key(tmp_path: Path) -> None:
    results = read_results(written(tmp_path, CONTRACT))
    write_results(tmp_path / "again.json", results)
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert CONTRACT["rows"][0].items() <= again["rows"][0].items()
    assert CONTRACT["workload"].items() <= again["workload"].items()
    assert CONTRACT["environment"].items() <= again["environment"].items()
    assert read_results(tmp_path / "again.json") == results


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=60))
def test_seconds_are_those_of_numpy(samples: list[float]) -> None:
    found = summarize_seconds(samples)
    p10, median, p90 = np.percentile(samples, [10, 50, 90])
    assert found.n == len(found.samples) == len(samples)
    np.testing.assert_allclose(
        [found.median, found.p10, found.p90, found.mean],
        [median, p10, p90, np.mean(samples)],
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("samples", [[], [float("nan")], [float("inf")], [-1.0]])
def test_seconds_that_cannot_be_summarised_are_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no samples|finite|greater than"):
        summarize_seconds(samples)


def test_a_metric_that_one_prompt_lacks_has_no_mean() -> None:
    quality = summarize_quality(
        "baseline",
        [
            PromptQuality(id=0, lpips=0.2, ssim=0.8, psnr=20.0, ms_ssim=0.9),
            PromptQuality(id=1, lpips=0.4, ssim=0.6, psnr=30.0, ms_ssim=None),
        ],
        reason="prompt 1 is too small for MS-SSIM",
    )
    assert quality.lpips == pytest.approx(0.3)
    assert quality.psnr == pytest.approx(25.0)
    assert quality.ms_ssim is None


def test_no_metric_needs_a_reason() -> None:
    assert summarize_quality("baseline", [], "random weights").lpips is None
    with pytest.raises(ValidationError, match="no reason"):
        summarize_quality("baseline", [])


def faults_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_results(path)
    assert caught.value.fix
    assert caught.value.exit_code == 2
    assert all("\n" not in fault for fault in caught.value.faults)
    return "\n".join(caught.value.faults)


def test_a_missing_file_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such results file") as caught:
        read_results(tmp_path / "none.json")
    assert "hasten bench" in caught.value.fix


@pytest.mark.parametrize("text", ["", "{", "results", '{"schema": 1,}'])
def test_text_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    assert "not JSON" in faults_of(written(tmp_path, text))


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(b'{"schema": "\xff"}')
    assert "not UTF-8 text" in faults_of(path)


@pytest.mark.parametrize("data", [[], {}, 3, {"rows": []}])
def test_other_json_is_not_taken_for_results(tmp_path: Path, data: object) -> None:
    assert "not a results file" in faults_of(written(tmp_path, data))


@pytest.mark.parametrize("version", [0, 3, "1", "2", 1.0, 2.0, True])
def test_unknown_versions_are_refused(tmp_path: Path, version: object) -> None:
    assert "is unknown" in faults_of(written(tmp_path, contract() | {"schema": version}))


def test_every_fault_is_listed_with_its_place(tmp_path: Path) -> None:
    data = contract()
    data["rows"][0]["speedup"] = "fast"
    data["rows"][0]["colour"] = "blue"
    data["workload"]["width"] = 0
    found = faults_of(written(tmp_path, data)).splitlines()
    assert len(found) == 3
    for place in ("rows[0].speedup", "rows[0].colour", "workload.width"):
        assert sum(place in fault for fault in found) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, number: str) -> None:
    text = json.dumps(CONTRACT).replace('"speedup": 1.0', f'"speedup": {number}')
    assert "rows[0].speedup" in faults_of(written(tmp_path, text))


def broken(path: str, value: object) -> dict[str, Any]:
    """The contract with one value replaced; `path` is keys and indices joined by dots."""
    data = contract()
    *parents, last = path.split(".")
    place: Any = data
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    place[int(last) if last.isdigit() else last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("rows.0.seconds_per_image.median", 1.5, "the samples give 2.0"),
        ("rows.0.seconds_per_image.n", 2, "3 samples"),
        ("rows.0.seconds_per_image", None, "speedup 1.0, but the samples give None"),
        (
            "rows.0",
            {"recipe": "baseline", "role": "baseline", "status": "ok"},
            "seconds_per_image and steps_computed are null",
        ),
        ("rows.0.extra", {"held GiB": 1e16}, "less than or equal to"),
        ("rows.0.extra", {"": 1.0}, "at least 1 character"),
        ("rows.1.reason", None, "reason is missing"),
        ("rows.1.status", "skipped", "unsupported"),
        ("rows.1", {**CONTRACT["rows"][0], "speedup": 1.0}, "more than one row"),
        ("rows.0", {**CONTRACT["rows"][1], "recipe": "compile"}, "first row"),
        ("rows.0.recipe", "compile", "role is baseline, but the row is named 'compile'"),
        ("rows.1.role", "baseline", "role is baseline, but the row is named 'fp8'"),
        ("rows.1.role", "winner", "rows[1].role"),
        ("rows.1.rival_of", ["cache"], "refers to missing rows: cache"),
        ("rows.0.quality.0.reference", "compile", "refers to missing rows: compile"),
        ("rows.0.speedup", 99.0, "speedup 99.0, but the samples give 1.0"),
        ("rows.0.speedup", None, "speedup None, but the samples give 1.0"),
        ("rows.1.speedup", 2.0, "speedup 2.0, but the samples give None"),
        ("rows.1.seconds_per_image", CONTRACT["rows"][0]["seconds_per_image"], "is not null"),
        ("rows.0.steps_computed.mean", 19, "mean is 19.0, but min is 18"),
        ("rows.0.seconds_per_image.mean", 1.0, "mean is 1.0, but the samples give 2.0"),
        ("workload.rounds", 2, "3 samples for 1 prompts in 2 rounds"),
        ("rows.0.images", ["a\0.png"], "leaves the results directory"),
        ("rows.0.images", ["../secret.png"], "leaves the results directory"),
        ("rows.0.images", ["/etc/secret.png"], "leaves the results directory"),
        ("rows.0.images", ["a.png", "b.png"], "2 images for 1 prompts"),
        ("rows.0.quality.0.lpips", 0.2, "per_prompt gives 0.1"),
        ("rows.0.quality.0.psnr", 101.0, "less than or equal to 100"),
        ("rows.0.quality.0.per_prompt.0.id", 7, "unknown prompts [7]"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, path: str, value: object, words: str) -> None:
    assert words in faults_of(written(tmp_path, broken(path, value)))


def test_quality_over_some_of_the_prompts_is_refused(tmp_path: Path) -> None:
    data = contract()
    data["workload"]["prompts"].append({"id": 1, "text": "a kite", "seed": 1})
    data["rows"][0]["images"] = []
    assert "scores 1 of 2 prompts against 'fp8'" in faults_of(written(tmp_path, data))


def test_a_last_baseline_belongs_at_the_end(tmp_path: Path) -> None:
    data = contract()
    data["rows"].insert(1, data["rows"][0] | {"recipe": "baseline-again"})
    assert "must be the last row" in faults_of(written(tmp_path, data))


def test_drift_is_the_ratio_of_the_two_baselines() -> None:
    data = contract()
    slower = summarize_seconds([2.0, 2.1, 2.2]).model_dump()
    data["rows"][0]["speedup"] = 2.05 / 2.0
    again = {"recipe": "baseline-again", "seconds_per_image": slower, "speedup": 2.05 / 2.1}
    data["rows"].append(data["rows"][0] | again)
    results = Results.model_validate(data)
    assert results.drift == pytest.approx(1.05)
    assert results.baseline_seconds == pytest.approx(2.05)
    assert results.uncertainty == pytest.approx(0.05 / 2.05)
    assert Results.model_validate(CONTRACT).drift is None


def test_quality_is_found_by_its_reference() -> None:
    row = Results.model_validate(CONTRACT).rows[0]
    found = row.quality_against("fp8")
    assert found is not None
    assert found.lpips == 0.1
    assert row.quality_against("baseline") is None


def test_nothing_can_be_changed_in_place() -> None:
    row = Results.model_validate(CONTRACT).rows[1]
    with pytest.raises(ValidationError, match="frozen"):
        row.reason = "another"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(InputError, match="No space left"):
        write_results(path, Results.model_validate(CONTRACT))
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_directory_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_results(tmp_path / "none" / "results.json", Results.model_validate(CONTRACT))


def test_nan_is_never_written_even_past_validation(tmp_path: Path) -> None:
    results = Results.model_validate(CONTRACT)
    row: Row = results.rows[0].model_copy(update={"speedup": float("nan")})
    with pytest.raises(InputError, match="not written"):
        write_results(tmp_path / "results.json", results.model_copy(update={"rows": (row,)}))
    assert os.listdir(tmp_path) == []


def first_version() -> dict[str, Any]:
    """A file as hasten wrote it before rows had roles."""
    data = contract()
    timed = dict(data["rows"][0], quality=[], images=[])
    for key in ("role", "rival_of"):
        del timed[key]

    def row(recipe: str, seconds: float, **changes: Any) -> dict[str, Any]:
        samples = summarize_seconds([seconds] * 3).model_dump(mode="json")
        old = {"peer": None, "quality_only": False, "speedup": 2.0 / seconds, **changes}
        return {**timed, "recipe": recipe, "seconds_per_image": samples, **old}

    rival = 'name = "x"\ndescription = "cache without its cache, in 18 steps"\n'
    data["rows"] = [
        row("baseline", 2.0),
        row("cache", 1.0),
        row("fewer-steps-18", 0.5, toml=rival),
        row("my-fewer-steps-idea", 1.0),
        row("graph", 9.0, quality_only=True, speedup=None),
        row("other", 1.0, peer="cache-dit 1.5.3"),
        row("baseline-again", 3.0),
    ]
    return data | {"schema": 1}


def test_a_file_of_the_first_version_gets_its_roles_and_both_baselines(tmp_path: Path) -> None:
    results = read_results(written(tmp_path, first_version()))
    assert [(row.recipe, row.role, row.rival_of, row.speedup) for row in results.rows] == [
        ("baseline", "baseline", (), 1.25),
        ("cache", "recipe", (), 2.5),
        ("fewer-steps-18", "rival", ("cache",), 5.0),
        ("my-fewer-steps-idea", "recipe", (), 2.5),
        ("graph", "graph", (), None),
        ("other", "peer", (), 2.5),
        ("baseline-again", "baseline", (), 2.5 / 3),
    ]
    assert results.rows[5].notes == ("cache-dit 1.5.3",)


def test_a_false_speed_up_of_the_first_version_is_not_believed(tmp_path: Path) -> None:
    data = first_version()
    data["rows"][1]["speedup"] = 99
    assert read_results(written(tmp_path, data)).rows[1].speedup == 2.5


@pytest.mark.parametrize("path", sorted(COMMITTED.rglob("results.json")), ids=str)
def test_committed_results_stay_readable(path: Path) -> None:
    assert read_results(path).rows[0].role == "baseline"


@pytest.mark.parametrize("name", ["folder", "pipe", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert "not a regular file" in faults_of(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": 2, "rows": ' + "9" * 5000 + "}"])
def test_text_that_python_cannot_hold_is_refused(tmp_path: Path, text: str) -> None:
    assert "not JSON" in faults_of(written(tmp_path, text))


def test_a_path_with_a_nul_character_is_refused() -> None:
    with pytest.raises(InputError, match="null"):
        read_results("a\0b")
