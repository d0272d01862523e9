"""`hasten recipes`: what it lists, shows and refuses."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest

from hasten.machine import Gpu, Machine
from hasten.presets import GUIDES, TO_START_WITH
from hasten.recipe import Recipe, preset_names, resolve
from hasten.results_file import read_results
from tests.cli.conftest import Run
from tests.engines.tensorrt.test_manifest import made

NO_COMPILER = Machine(
    python="3.12", os="Linux", cpu="a CPU", cores=2, ram_bytes=None, torch="2.13.0+cpu"
)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.machine.machine", lambda: NO_COMPILER)


def test_list_has_every_preset_and_is_the_default(run: Run) -> None:
    listed = run("recipes", "list")
    assert listed.code == 0
    for name in preset_names():
        assert name in listed.out
        assert resolve(name).description in listed.out
    assert run("recipes") == listed
    as_json = json.loads(run("recipes", "list", "--json").out)
    assert [entry["name"] for entry in as_json] == preset_names()


@pytest.mark.parametrize("name", preset_names())
def test_show_prints_what_reads_back_equal(run: Run, name: str) -> None:
    assert Recipe.from_toml(run("recipes", "show", name).out) == resolve(name)
    shown = json.loads(run("recipes", "show", name, "--json").out)
    assert Recipe.from_dict(shown) == resolve(name)


def test_schema_is_the_recipes(run: Run) -> None:
    assert json.loads(run("recipes", "schema").out) == Recipe.json_schema()


def test_check_accepts_a_good_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[cache]\ninterval = 4\n")
    ended = run("recipes", "check", "mine.toml", "--device", "cpu")
    assert ended == (0, "mine.toml: valid, and works here on cpu\n", "")
    assert run("recipes", "check", "mine.toml", "--schema-only").out == "mine.toml: valid\n"


def test_check_lists_every_fault_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("cahce = 1\n[cache]\ninterval = 0\n[compile]\nmode = 'x'\n")
    ended = run("recipes", "check", "bad.toml")
    assert ended.code == 2
    assert ended.out == ""
    assert len(ended.errors) == 3
    assert len(ended.fixes) == 1
    for offender in ("cahce", "cache.interval", "compile.mode"):
        assert any(offender in line for line in ended.errors)
    data = json.loads(run("recipes", "check", "bad.toml", "--json").out)
    assert data["valid"] is False
    assert len(data["faults"]) == 3


@pytest.mark.usefixtures("no_compiler")
def test_check_finds_what_this_machine_cannot_do(run: Run) -> None:
    ended = run("recipes", "check", "compile")
    assert ended.code == 1
    assert ended.errors == [line for line in ended.errors if "needs a C++ compiler" in line]
    assert len(ended.errors) == len(ended.fixes) == 1
    assert "apt-get install" in ended.fixes[0]
    assert run("recipes", "check", "compile", "--schema-only").code == 0
    assert run("recipes", "check", "cache").code == 0
    data = json.loads(run("recipes", "check", "compile", "--json").out)
    assert data["valid"] is True
    assert data["works_here"] is False


@pytest.mark.usefixtures("no_compiler")
def test_check_asks_about_the_device_that_is_named(run: Run) -> None:
    ended = run("recipes", "check", "cache", "--device", "cuda")
    assert ended.code == 1
    assert "built without CUDA" in ended.errors[0]


def test_check_gives_each_of_several_problems_its_fix(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = dataclasses.replace(NO_COMPILER, python_headers=True)
    monkeypatch.setattr("hasten.machine.machine", lambda: here)
    (tmp_path / "two.toml").write_text("[compile]\n[offload]\nkind = 'model'\n")
    ended = run("recipes", "check", "two.toml")
    assert ended.code == 1
    assert len(ended.errors) == 2
    assert len(ended.fixes) == 2


RTX = dataclasses.replace(
    NO_COMPILER, cuda="13.0", tensorrt="1.7", gpus=(Gpu(0, "RTX 5090", (12, 0), 1 << 35),)
)


@pytest.mark.parametrize(
    ("targets", "precision", "fault"),
    [
        (None, "fp8", "no manifest.json, so there is no export"),
        (("sm120",), "fp8", None),
        (("sm120",), "fp8", "flux/model.onnx: missing"),
        (("sm120",), "fp8", "flux/model.onnx: damaged"),
        (("sm120",), "bf16", "has fp8, and engine.precision is 'bf16'"),
        (("sm89",), "fp8", "has an engine for sm89, and this GPU is sm120"),
    ],
)
def test_check_looks_at_the_export_that_a_recipe_names(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    targets: tuple[str, ...] | None,
    precision: str,
    fault: str | None,
) -> None:
    monkeypatch.setattr("hasten.machine.machine", lambda: RTX)
    folder = tmp_path / "deep" / "flux"
    folder.mkdir(parents=True)
    if targets is not None:
        manifest = made(targets=targets)
        manifest.write(folder / "manifest.json")
        for name in manifest.files:
            (folder / name).write_text("x" if fault and f"{name}: damaged" in fault else "")
    if fault is not None and "missing" in fault:
        (folder / "model.onnx").unlink()
    text = f'[engine]\nprecision = "{precision}"\npath = "flux"\n'
    (tmp_path / "deep" / "mine.toml").write_text(text)
    ended = run("recipes", "check", "deep/mine.toml")
    assert ended.code == (0 if fault is None else 1)
    assert [fault in line for line in ended.errors] == ([] if fault is None else [True])
    assert len(ended.fixes) == len(ended.errors)
    assert run("recipes", "check", "deep/mine.toml", "--schema-only").code == 0


def test_a_recipe_that_changes_nothing_is_said_to(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('description = "to be filled in"\n')
    ended = run("recipes", "check", "mine.toml", "--schema-only")
    assert (ended.code, ended.out) == (
        0,
        "mine.toml: valid; it has no sections, so it changes nothing\n",
    )
    shown = run("recipes", "check", "mine.toml", "--schema-only", "--json")
    assert json.loads(shown.out)["changes_nothing"] is True
    assert "nothing" not in run("recipes", "check", "cache", "--schema-only").out


def test_a_recipe_in_utf_16_as_powershell_redirects_it(run: Run, tmp_path: Path) -> None:
    shown = run("recipes", "show", "cache")
    (tmp_path / "größe.toml").write_text(shown.out, "utf-16")
    ended = run("recipes", "check", "größe.toml", "--schema-only")
    assert (ended.code, ended.out) == (0, "größe.toml: valid\n")


def test_every_preset_has_its_guide_and_every_guide_its_preset() -> None:
    files = {path.stem for path in Path(str(resources.files("hasten.presets"))).glob("*.toml")}
    assert {*GUIDES} == files
    assert list(GUIDES)[-1] == "baseline"
    assert {name for names in TO_START_WITH.values() for name in names} <= files


STUDIES = Path(__file__).parents[2] / "studies" / "results"
MEASURED_IN = ("presets/1024-50", "flux-dev-shape-1024")


def test_speeds_are_those_of_committed_results() -> None:
    measured = {"baseline": 1.0}
    for pattern in MEASURED_IN:
        for folder in STUDIES.glob(pattern):
            for row in read_results(folder / "results.json").rows:
                name = row.recipe.removeprefix("hasten:").replace("fewer-steps-18", "fewer-steps")
                measured.setdefault(name, row.speedup or 0.0)
    said = {name: float(guide.speed[:-1]) for name, guide in GUIDES.items() if guide.speed}
    assert said == {name: pytest.approx(measured[name], abs=0.051) for name in said}


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_list_breaks_between_words(
    run: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    whole = set(run("recipes", "list").out.split())
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("recipes", "list").out.splitlines()
    assert max(map(len, lines)) <= columns
    assert {word for line in lines for word in line.split()} <= whole
    assert ("what it does" in lines[0]) == (columns > 60)
