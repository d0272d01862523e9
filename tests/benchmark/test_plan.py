"""Options to workload, and every fault of the input at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hasten.benchmark.plan import Options, plan_benchmark, resolve_workload, settings_of
from hasten.benchmark.store import BenchmarkStore
from hasten.errors import Faults, InputError, ModelError, RecipeError
from hasten.recipe import Recipe, Sampling
from hasten.results import Workload
from hasten.settings import Settings


def resolved(**options: Any) -> Workload:
    faults = Faults()
    workload = resolve_workload(Options(**{"model": "owner/name", **options}), faults)
    faults.raise_any()
    return workload


def test_the_models_defaults_fill_what_is_not_said(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "hasten.json").write_text(
        '{"width": 64, "height": 96, "steps": 7, "guidance": 2, "max_sequence_length": 16}'
    )
    workload = resolved(model=str(tmp_path))
    assert (workload.width, workload.height, workload.steps) == (64, 96, 7)
    assert (workload.guidance, workload.max_sequence_length) == (2.0, 16)
    assert len(workload.prompts) == 50
    assert workload.prompt_source == "general"


def test_what_is_said_wins_and_each_prompt_has_its_seed() -> None:
    workload = resolved(size="64x48", steps=3, guidance=0, seed=100, limit=2, last=5)
    assert (workload.width, workload.height) == (64, 48)
    assert (workload.steps, workload.guidance) == (3, 0.0)
    assert [(p.id, p.seed) for p in workload.prompts] == [(0, 100), (1, 101)]
    assert workload.prompt_source == "general, last 5"


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"prompt {n}" for n in range(60)))
    assert len(resolved(prompts=path).prompts) == 60
    assert [p.text for p in resolved(prompts=path, last=2).prompts] == ["prompt 58", "prompt 59"]


def test_names_that_are_not_utf8_are_escaped_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "\udcff.txt"
    path.write_text("a kite")
    assert resolved(prompts=path).prompt_source == f"{tmp_path}/\\udcff.txt"
    with pytest.raises(InputError, match="not printable"):
        resolved(model="owner/\udcff")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("seed", -1),
        ("seed", 2**63),
        ("rounds", 0),
        ("guidance", math.nan),
        ("guidance", -1),
        ("guidance", math.inf),
        ("max_sequence_length", 513),
        ("limit", 0),
        ("last", -2),
        ("size", "100x64"),
        ("size", "big"),
        ("dtype", "int8"),
    ],
)
def test_each_bad_option_is_one_fault(option: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        resolved(**{option: value})
    assert len(caught.value.faults) == 1
    assert str(value) in caught.value.faults[0] or option == "size"


def test_everything_wrong_is_said_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    options = Options(steps=0, size="100x64", limit=0, rounds=-1, device="auto", dtype="fp3")
    with pytest.raises(InputError) as caught:
        plan_benchmark(
            options, ["baseline", "cahce", "no/such.toml"], ["compile"], BenchmarkStore(out)
        )
    text = str(caught.value)
    for part in ("steps", "width 100", "limit", "rounds", "'fp3'", "'cahce'", "no/such.toml"):
        assert part in text
    assert "reference 'compile'" in text
    assert text.count("fix:") == len(caught.value.faults) == 8  # each its own
    assert not out.parent.exists()


def test_a_lone_fault_keeps_its_kind(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        plan_benchmark(Options(model="owner/name"), ["cahce"], [], BenchmarkStore(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "hasten.json").write_text("{")
    with pytest.raises(ModelError):
        resolved(model=str(tmp_path))


def test_a_device_that_is_not_here_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cuda:99") as caught:
        plan_benchmark(
            Options(device="cuda:99"), ["baseline", "cahce"], [], BenchmarkStore(tmp_path)
        )
    assert "cahce" in str(caught.value)


def test_sampling_overrides_the_workload_for_its_row() -> None:
    workload = resolved(size="64x48", steps=9, guidance=2, max_sequence_length=99)
    assert settings_of(Recipe(), workload) == Settings(64, 48, 9, 2.0, 99)
    half = Recipe(sampling=Sampling(steps=4, guidance=0.0))
    assert settings_of(half, workload) == Settings(64, 48, 4, 0.0, 99)
    full = Recipe(sampling=Sampling(size="32x16", max_sequence_length=7))
    assert settings_of(full, workload) == Settings(32, 16, 9, 2.0, 7)


def test_a_used_folder_is_one_fault_among_the_others(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        plan_benchmark(Options(steps=0), ["baseline"], [], BenchmarkStore(tmp_path))
    assert len(caught.value.faults) == 2
