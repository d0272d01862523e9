"""`hasten doctor`: findings on machines that lack something."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.cli import doctor
from hasten.cli.doctor import compiler_problem
from hasten.errors import Problem
from hasten.machine import Gpu, Machine, machine
from tests.cli.conftest import Ended, Run


def bare(**present: Any) -> Machine:
    here = {"python": "3.12", "os": "Linux", "cpu": "a CPU", "cores": 2, "ram_bytes": 2**34}
    return Machine(**{**here, "torch": "2.13.0+cpu", **present})


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, run: Run) -> Callable[..., Ended]:
    """Run the doctor on a made-up machine."""

    def doctor(here: Machine, *options: str) -> Ended:
        monkeypatch.setattr("hasten.machine.machine", lambda: here)
        return run("doctor", *options)

    return doctor


@pytest.fixture
def bundled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the bundled model's files."""
    import torch
    from safetensors.torch import save_file

    directory = tmp_path / "tiny_flux"
    directory.mkdir()
    (directory / "model_index.json").write_text("{}")
    save_file({"weight": torch.zeros(8)}, directory / "model.safetensors")
    monkeypatch.setattr("hasten.models.defaults.TINY_DIR", directory)
    return directory


def statuses(ended: Ended) -> dict[str, str]:
    findings = json.loads(ended.out)["findings"]
    return {finding["what"]: finding["status"] for finding in findings}


@pytest.mark.usefixtures("bundled")
def test_without_a_compiler_compiling_recipes_do_not_work(on: Callable[..., Ended]) -> None:
    ended = on(bare(python_headers=True), "--json")
    assert ended.code == 0
    found = statuses(ended)
    assert found["torch.compile (cpu)"] == "no"
    assert found["recipe compile"] == found["recipe cache-compile"] == "no"
    assert found["recipe cache"] == found["recipe baseline"] == "ok"
    assert found["gpu"] == "no"
    assert found["model hub"] == "not checked"


@pytest.mark.usefixtures("bundled")
def test_the_table_gives_the_fix_of_each_finding(on: Callable[..., Ended]) -> None:
    ended = on(bare(python_headers=True))
    assert ended.code == 0
    assert ended.err == ""
    assert "apt-get install g++" in ended.out.partition("to fix")[2]


def test_a_damaged_bundled_model_is_an_error(on: Callable[..., Ended], bundled: Path) -> None:
    weights = bundled / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    ended = on(bare())
    assert ended.code == 1
    assert len(ended.errors) == len(ended.fixes) == 1
    assert "model.safetensors" in ended.errors[0]
    weights.unlink()
    assert "not in" in on(bare()).errors[0]


@pytest.mark.usefixtures("bundled")
def test_gpus_are_told(on: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is made up, so its trial multiplication runs on the CPU."""
    import torch

    ones = torch.ones
    monkeypatch.setattr("torch.ones", lambda *shape, device, **options: ones(*shape, **options))
    gpu = Gpu(0, "Tesla T4", (7, 5), 16 * 2**30)
    here = bare(gpus=(gpu,), cuda="13.0", driver="580.1", triton="3.5", c_compiler="/usr/bin/gcc")
    ended = on(here)
    assert "Tesla T4, 16 GiB, compute 7.5, driver 580.1" in ended.out
    assert "no Python.h" in ended.out


@pytest.mark.parametrize(
    ("failure", "status", "detail"),
    [(None, "ok", "access"), (ConnectionError("no route"), "no", "not reachable: no route")],
)
@pytest.mark.usefixtures("bundled")
def test_the_hub_is_asked_only_on_request(
    on: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception | None,
    status: str,
    detail: str,
) -> None:
    def auth_check(model: str) -> None:
        if failure is not None:
            raise failure

    monkeypatch.setattr("huggingface_hub.auth_check", auth_check)
    ended = on(bare(), "--hub", "--json")
    assert ended.code == 0
    finding = json.loads(ended.out)["findings"][-1]
    assert finding["status"] == status
    assert detail in finding["detail"]


def test_the_compiler_here_is_really_tried() -> None:
    here = machine()
    if here.compile_problem("cpu") is not None:
        pytest.skip("no C++ compiler here")
    assert compiler_problem(str(here.cxx_compiler)) is None


def test_a_compiler_that_only_answers_version_is_found_out(tmp_path: Path) -> None:
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\necho "fatal error: omp.h: No such file" >&2\nexit 1\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    problem = compiler_problem(str(fake))
    assert problem is not None
    assert "omp.h: No such file" in problem.fault
    assert "libgomp1" in problem.fix


def test_what_exports_take_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    assert doctor._kept_engines() == ""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "engine.plan").write_bytes(b"0" * 3 * 2**20)
    assert doctor._kept_engines() == f"; {tmp_path / 'tensorrt'} holds 3 MiB, safe to delete"


GCC = {"c_compiler": "/usr/bin/gcc", "cxx_compiler": "/usr/bin/g++", "python_headers": True}


@pytest.mark.parametrize(
    ("capability", "present", "preset"),
    [
        ((9, 0), {"triton": "3.5", **GCC}, "balanced"),
        ((8, 6), {"triton": "3.5", **GCC}, "int8"),
        ((7, 0), {}, "lossless"),
        (None, GCC, "cache-compile"),
        (None, {}, "cache"),
    ],
)
@pytest.mark.usefixtures("bundled")
def test_the_last_line_is_a_command_to_start_with(
    on: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    present: dict[str, Any],
    preset: str,
) -> None:
    monkeypatch.setattr("hasten.cli.doctor._gpu", lambda here: "a GPU")
    monkeypatch.setattr("hasten.cli.doctor.compiler_problem", lambda compiler: None)
    gpus = () if capability is None else (Gpu(0, "a GPU", capability, 80 * 2**30),)
    here = bare(gpus=gpus, cuda="13.0", **present)
    last = on(here).out.splitlines()[-1]
    assert last == f"start with: hasten generate 'a rocket' --recipe {preset}"


@pytest.mark.usefixtures("bundled")
def test_a_compiler_that_does_not_compile_is_not_started_with(
    on: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Problem("no omp.h", "install it")
    monkeypatch.setattr("hasten.cli.doctor.compiler_problem", lambda compiler: broken)
    assert json.loads(on(bare(**GCC), "--json").out)["start_with"][-1] == "cache"


@pytest.mark.usefixtures("bundled")
def test_the_model_that_is_meant_is_looked_at(
    on: Callable[..., Ended], saved_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.models.load.machine", bare)
    ended = on(bare(), "--model", str(saved_model))
    assert ended.code == 0
    assert f"--model {saved_model} --recipe cache" in ended.out.splitlines()[-1]
    monkeypatch.setattr("hasten.models.load.free_memory", lambda: 2**30)
    ended = on(bare(), "--model", "shape:flux.1-dev")
    assert ended.code == 1
    assert "takes 62.8 GiB of memory" in ended.errors[0]
    assert "start with" not in ended.out


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.usefixtures("bundled")
def test_tables_break_between_words(
    on: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    whole = set(on(bare()).out.split())
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = on(bare()).out.splitlines()
    assert max(map(len, lines[:-1])) <= columns
    assert {word for line in lines for word in line.split()} <= whole
