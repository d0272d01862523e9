"""`hasten export tensorrt`: every fault at once, and what a repeat makes and does not make."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from hasten.engines.tensorrt.files import facts_of_file
from hasten.engines.tensorrt.folder import RECIPE
from hasten.engines.tensorrt.manifest import MANIFEST, Manifest
from hasten.engines.tensorrt.targets import TARGETS
from hasten.sealed import unseal
from tests.cli.conftest import Run
from tests.cli.test_app import PROGRAM
from tests.engines.tensorrt.test_manifest import made
from tests.hub_cache import write_hub_cache

STAGES = ["preflight", "export", "verify", "build", "write"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tensorrt"


def test_every_fault_at_once_and_nothing_written(run: Run, tmp_path: Path) -> None:
    arguments = ["--precision", "fp8", "--target", "sm86,sm90", "--limit", "0", "--steps", "0"]
    arguments += ["--max-size", "100x100", "--calibration", "entropy", "--prompts", "none.txt"]
    ended = run("export", "tensorrt", *arguments)
    assert ended.code == 2
    parts = ("sm86", "sm90", "limit = 0", "steps = 0", "width 100", "height 100", "'entropy'")
    for part in (*parts, "none.txt"):
        assert [line for line in ended.errors if part in line], part
    assert len(ended.errors) == len(parts) + 1
    lines = ended.err.splitlines()
    assert len(lines) == len(ended.errors) + len(ended.fixes)
    for target in ("sm86", "sm90"):  # each is followed by what mends it
        (at,) = (number for number, line in enumerate(lines) if f"target {target}" in line)
        assert lines[at + 1].startswith(f"fix: remove {target}")
    assert "fix: the closest valid size is 112x112" in lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "fault", "fix"),
    [
        ([], 2, "--target is missing", "--target sm89"),
        (["--target", "ada"], 2, "'ada' is not a target", "sm89"),
        (["--target", "sm88"], 2, "unknown target sm88", "did you mean"),
        (["--target", "sm90"], 1, "datacenter", 'recipe "fp8"'),
        (["--target", "sm90,sm100"], 1, "sm90 (Hopper", "remove sm90"),
        (["--target", "sm86"], 1, "sm86 (Ampere: RTX 30, A10, A40) does not support fp8", "bf16"),
        (["--target", "sm89", "--precision", "int4"], 2, "'int4' is not one of", "fp8"),
        (["--target", "sm89", "--model", "./none"], 1, "no such model directory", "path"),
    ],
)
def test_bad_options(
    run: Run, tmp_path: Path, arguments: list[str], code: int, fault: str, fix: str
) -> None:
    ended = run("export", "tensorrt", *arguments)
    assert (ended.code, ended.out) == (code, "")
    assert fault in ended.errors[0]
    assert fix in ended.fixes[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["general", "tiny"])
def test_a_bundled_set_of_prompts_goes_by_its_name(run: Run, name: str) -> None:
    ended = run("export", "tensorrt", "--target", "sm90", "--prompts", name)
    (error,) = ended.errors
    assert "sm90" in error


def test_the_extra_is_not_installed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("onnx", "tensorrt_rtx", "modelopt"):
        monkeypatch.setitem(sys.modules, module, None)
    ended = run("export", "tensorrt", "--target", "sm89")
    assert ended.errors == ["error: not installed: onnx, tensorrt_rtx, modelopt"]
    assert ended.fixes == ["fix: pip install 'hasten[tensorrt]'"]
    assert list(tmp_path.iterdir()) == []


def test_without_the_check_its_package_is_not_needed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run("export", "tensorrt", "--target", "sm89").errors == [
        "error: not installed: onnxruntime"
    ]
    (error,) = run("export", "tensorrt", "--target", "sm90", "--no-verify").errors
    assert "sm90" in error


def test_bad_input_loads_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from hasten.cli import main\n"
        "code = main(['export', 'tensorrt', '--target', 'sm90'])\n"
        "sys.exit(3 if {'torch', 'onnx', 'tensorrt_rtx'} & set(sys.modules) else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False)
    assert done.returncode == 1


def test_the_group_shows_its_help(run: Run) -> None:
    assert "tensorrt" in run("export").out
    assert run("export", "--help").code == 0


def command(model: Path | str, *arguments: str) -> list[str]:
    given = ["--model", str(model), "--precision", "bf16", "--target", "sm89"]
    return [*PROGRAM, "export", "tensorrt", *given, "--max-size", "64x64", *arguments]


def ended(model: Path | str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = command(model, *arguments)
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)


def stage_lines(err: str) -> dict[str, bool]:
    """Stages in order and whether they were made before; nothing else may be on stderr."""
    found = [re.fullmatch(r"(\w+) +\d+\.\d s(  \(cached\))?", x) for x in err.splitlines()]
    assert all(found), err
    return {match[1]: match[2] is not None for match in found if match}


@pytest.mark.parametrize("changes", [False, True])
def test_a_model_that_changes_meanwhile_is_exported_again(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, changes: bool
) -> None:
    """Loading and exporting are stand-ins: what is looked at is what the next command does."""
    exports: list[Path] = []

    def export_tensorrt(_: Any, out: Path, *__: Any, **___: Any) -> Manifest:
        exports.append(out)
        if changes:
            index = saved_model / "model_index.json"
            index.write_text(index.read_text() + " ")
        out.mkdir(exist_ok=True)
        manifest = made(precision="bf16", targets=())
        for name in manifest.files:
            (out / name).touch()
        manifest.write(out / MANIFEST)
        (out / RECIPE).touch()
        return manifest

    monkeypatch.setattr("hasten.models.load_pipeline", lambda *_, **__: MagicMock())
    monkeypatch.setattr("hasten.engines.tensorrt.stages.export_tensorrt", export_tensorrt)
    arguments = ["--model", str(saved_model), "--precision", "bf16", "--target", "sm89"]
    for _ in range(2):
        done = run("export", "tensorrt", *arguments, "--out", str(tmp_path / "engine"))
        assert done.code == 0, done.err
    assert len(exports) == 1 + changes


def test_ctrl_c_says_that_stages_are_kept(
    saved_model: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("hasten.models.load_pipeline", interrupted)
    done = run("export", "tensorrt", "--model", str(saved_model), "--target", "none")
    assert done.code == 130
    assert done.err.splitlines() == [
        "error: interrupted",
        "fix: run the same command again to go on: finished stages are kept",
    ]


@pytest.mark.slow
def test_export_repeat_and_rebuild(saved_model: Path, tmp_path: Path, cache: Path) -> None:
    done = ended(saved_model, tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert stage_lines(done.stderr) == dict.fromkeys(STAGES, False)
    told: dict[str, Any] = json.loads(done.stdout)
    assert told == unseal((tmp_path / "engine" / "manifest.json").read_text())
    assert told["model"] == saved_model.name
    assert told["shapes"] == {"text": 8, "least": 4, "best": 4, "most": 16}
    engine = facts_of_file(tmp_path / "engine" / "engine.plan")

    start = time.perf_counter()
    again = ended(saved_model, tmp_path)
    seconds = time.perf_counter() - start
    assert (again.returncode, again.stderr) == (0, "")
    assert seconds < 5
    assert re.fullmatch(
        r"engine: bf16 engine for sm89 of small_model0; graph \d+ KiB, engine \d+ MiB; "
        r"error against torch at most \d\.\de-0\d; made before\n"
        r"next \(on sm89\): hasten generate 'a rocket' --recipe engine/recipe.toml "
        r"--model \S+\n",
        again.stdout,
    )

    subprocess.run(["rm", "-r", str(cache)], check=True)
    rebuilt = ended(saved_model, tmp_path, "--no-verify")
    assert list(stage_lines(rebuilt.stderr).items()) == [
        (name, False) for name in STAGES if name != "verify"
    ]
    assert "the graph was not verified" in rebuilt.stdout
    assert facts_of_file(tmp_path / "engine" / "engine.plan") == engine


@pytest.mark.slow
def test_a_repeat_for_a_model_of_the_hub_loads_no_torch(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hub_cache(tmp_path / "hub", "someone/small", saved_model)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = ended("someone/small", tmp_path, "--target", "none", "--no-verify")
    assert done.returncode == 0, done.stderr
    program = (
        "import sys\n"
        "from hasten.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "sys.exit(3 if {'torch', 'diffusers'} & set(sys.modules) else code)\n"
    )
    given = command("someone/small", "--target", "none", "--no-verify")[len(PROGRAM) :]
    again = subprocess.run(
        [sys.executable, "-c", program, *given],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == done.stdout.replace("\n", "; made before\n", 1)
    assert again.stdout.startswith("engine: bf16 graph of someone/small; graph ")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_the_bundled_model(tmp_path: Path, precision: str) -> None:
    """Alone on two cores each takes less than 60 s, which `studies.tensorrt` measures; here
    other tests share them."""
    arguments = ["--precision", precision, "--target", "sm89", "--limit", "1", "--steps", "4"]
    program = [*PROGRAM, "export", "tensorrt", *arguments, "--json"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    stages = {stage["name"]: stage["seconds"] for stage in told["stages"]}
    assert stages["export"] + stages["verify"] + stages["build"] < 120
    for size in told["verification"]["sizes"]:
        assert max(size["blocks"].values()) < 0.01
        assert precision == "fp8" or size["whole"] < 0.002
        assert (size["unquantised"] is None) == (precision != "fp8")


def test_the_help_names_every_target_and_its_gpus(run: Run) -> None:
    shown = " ".join(run("export", "tensorrt", "--help").out.split())
    for target, gpus in TARGETS.items():
        assert f"{target}: {gpus.partition(': ')[2]};" in shown
