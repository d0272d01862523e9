"""What a machine is said to be able to do, on made-up machines and on this one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import InputError
from hasten.machine import DTYPES, Gpu, Machine, check_dtype, machine

GIB = 2**30
H100 = Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB)
L4 = Gpu(1, "NVIDIA L4", (8, 9), 24 * GIB)
T4 = Gpu(0, "Tesla T4", (7, 5), 16 * GIB)
P100 = Gpu(0, "Tesla P100", (6, 0), 16 * GIB)

CPU_ONLY = Machine(
    python="3.12.1",
    os="Linux",
    cpu="a CPU",
    cores=8,
    ram_bytes=32 * GIB,
    torch="2.13.0+cpu",
    cxx_compiler="/usr/bin/g++",
    c_compiler="/usr/bin/gcc",
    python_headers=True,
)
SERVER = dataclasses.replace(
    CPU_ONLY,
    torch="2.13.0+cu130",
    cuda="13.0",
    driver="580.65",
    gpus=(H100, L4),
    torch_architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "compute_120"),
    triton="3.5.0",
)


def with_gpu(gpu: Gpu) -> Machine:
    return dataclasses.replace(SERVER, gpus=(gpu,))


@pytest.mark.parametrize(
    ("here", "device", "dtype"),
    [
        (CPU_ONLY, "cpu", "float32"),
        (SERVER, "cuda", "bfloat16"),
        (with_gpu(T4), "cuda", "float16"),
        (dataclasses.replace(CPU_ONLY, mps=True), "cpu", "float32"),
    ],
)
def test_auto_takes_the_best_device_and_its_dtype(here: Machine, device: str, dtype: str) -> None:
    assert here.default_device() == device
    assert here.default_dtype(device) == dtype


def test_a_usable_device_is_named_and_any_other_refused() -> None:
    assert CPU_ONLY.usable_device("auto") == "cpu"
    assert SERVER.usable_device("auto") == "cuda"
    assert SERVER.usable_device("cuda:1") == "cuda:1"
    with pytest.raises(InputError, match="no such GPU"):
        SERVER.usable_device("cuda:2")


def test_dtypes_by_name() -> None:
    for name in ("auto", *DTYPES):
        check_dtype(name)
    with pytest.raises(InputError, match="'int8' is not a dtype") as caught:
        check_dtype("int8")
    assert "bfloat16" in caught.value.fix


def test_dtype_follows_the_gpu_that_is_named() -> None:
    mixed = dataclasses.replace(SERVER, gpus=(H100, dataclasses.replace(T4, index=1)))
    assert mixed.default_dtype("cuda:0") == "bfloat16"
    assert mixed.default_dtype("cuda:1") == "float16"


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_complete_server_has_no_problems(device: str) -> None:
    assert SERVER.device_problem(device) is None
    assert SERVER.compile_problem(device) is None


@pytest.mark.parametrize(
    ("here", "device", "fault", "fix"),
    [
        (CPU_ONLY, "cuda", "built without CUDA", "CUDA build of torch"),
        (dataclasses.replace(SERVER, gpus=()), "cuda", "finds no CUDA device", "nvidia-smi"),
        (SERVER, "cuda:2", "no such GPU", "cuda:0, cuda:1"),
        (CPU_ONLY, "mps", "no Apple GPU", "cpu"),
        (CPU_ONLY, "tpu", "'tpu' is not one of", "cpu"),
        (SERVER, "cuda:-1", "is not one of", "cuda"),
        (SERVER, "cuda:", "is not one of", "cuda"),
        (with_gpu(P100), "cuda", "no kernels for Tesla P100 (sm_60)", "sm_75, sm_80"),
    ],
)
def test_device_problems_say_what_and_how(here: Machine, device: str, fault: str, fix: str) -> None:
    for problem in (here.device_problem(device), here.compile_problem(device)):
        assert problem is not None
        assert fault in problem.fault
        assert fix in problem.fix
        assert "\n" not in problem.fault + problem.fix


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 9), ("sm_86",), True),  # a later minor of the same major
        ((8, 0), ("sm_86",), False),  # an earlier one
        ((9, 0), ("sm_86",), False),  # binary code does not cross majors
        ((9, 0), ("compute_86",), True),  # PTX is compiled for anything later
        ((9, 0), ("sm_90a",), True),
        ((12, 0), ("sm_120",), True),
        ((9, 4), ("gfx942",), True),  # ROCm names: nothing to compare with
    ],
)
def test_architectures_follow_cuda_compatibility(
    capability: tuple[int, int], built_for: tuple[str, ...], runs: bool
) -> None:
    here = dataclasses.replace(
        SERVER, gpus=(Gpu(0, "GPU", capability, GIB),), torch_architectures=built_for
    )
    assert (here.device_problem("cuda") is None) is runs


@pytest.mark.parametrize(
    ("here", "device", "fault"),
    [
        (dataclasses.replace(CPU_ONLY, cxx_compiler=None), "cpu", "needs a C++ compiler"),
        (dataclasses.replace(CPU_ONLY, python_headers=False), "cpu", "no Python.h in"),
        (dataclasses.replace(SERVER, c_compiler=None), "cuda", "needs a C compiler"),
        (dataclasses.replace(SERVER, python_headers=False), "cuda", "no Python.h in"),
        (dataclasses.replace(SERVER, triton=None), "cuda", "Triton"),
        (
            dataclasses.replace(with_gpu(P100), torch_architectures=("sm_60",)),
            "cuda",
            "7.0 or later; Tesla P100 has 6.0",
        ),
        (dataclasses.replace(CPU_ONLY, mps=True), "mps", "not tested"),
    ],
)
def test_compile_problems_are_not_device_problems(here: Machine, device: str, fault: str) -> None:
    problem = here.compile_problem(device)
    assert problem is not None
    assert fault in problem.fault
    assert problem.fix
    assert here.device_problem(device) is None


def test_the_gpu_does_not_need_the_cpp_compiler() -> None:
    assert dataclasses.replace(SERVER, cxx_compiler=None).compile_problem("cuda") is None


@given(st.text(max_size=12))
def test_any_device_name_is_answered(device: str) -> None:
    for here in (CPU_ONLY, SERVER):
        problem = here.device_problem(device)
        assert problem is None or (problem.fault and problem.fix)


def test_this_machine_agrees_with_torch() -> None:
    import torch

    here = machine()
    assert here.torch == torch.__version__
    assert len(here.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.ram_bytes is None or here.ram_bytes > GIB // 4
    assert machine() is here


def test_the_compiler_is_the_one_inductor_takes() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    here = machine()
    if here.cxx_compiler is None:
        pytest.skip("no C++ compiler here")
    assert Path(here.cxx_compiler).name == Path(get_cpp_compiler()).name


def fresh_machine(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Machine:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return machine.__wrapped__()


def program(path: Path, exit_code: int) -> Path:
    path.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    path.chmod(0o755)
    return path


def test_compilers_are_taken_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = program(tmp_path / "good", exit_code=0)
    here = fresh_machine(monkeypatch, CXX=str(good), CC=str(good))
    assert here.cxx_compiler == here.c_compiler == str(good)


def test_a_compiler_that_does_not_start_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = program(tmp_path / "broken", exit_code=1)
    here = fresh_machine(monkeypatch, CXX=str(broken), CC="/nowhere/cc")
    assert here.cxx_compiler is None
    assert here.c_compiler is None
    problem = here.compile_problem("cpu")
    assert problem is not None
    assert str(broken) in problem.fault


def test_no_compiler_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    here = fresh_machine(monkeypatch, PATH=str(tmp_path))
    assert here.cxx_compiler is None
    assert here.c_compiler is None


def test_importing_the_module_imports_no_torch() -> None:
    code = "import sys, hasten.machine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ENGINES = dict.fromkeys(("tensorrt", "modelopt", "onnx", "onnxscript", "onnxruntime"), "1.0")
RTX_3090 = Gpu(0, "NVIDIA GeForce RTX 3090", (8, 6), 24 * GIB)


@pytest.mark.parametrize(
    ("gpu", "kind", "precision", "fault", "fix"),
    [
        (
            None,
            "tensorrt",
            "fp8",
            "runs on an RTX GPU, and this is cpu",
            "run its graph on the CPU",
        ),
        (H100, "tensorrt", "bf16", "no engines for NVIDIA H100", "preset fp8"),
        (RTX_3090, "tensorrt", "fp8", "needs compute capability 8.9", '"bf16"'),
        (T4, "tensorrt", "bf16", "needs compute capability 8.0", '"fp16"'),
        (L4, "onnxruntime", "fp8", "runs on the CPU, and this is cuda", "--device cpu"),
    ],
)
def test_engines_that_cannot_run_say_why_and_what_does(
    gpu: Gpu | None, kind: str, precision: str, fault: str, fix: str
) -> None:
    here = dataclasses.replace(with_gpu(gpu) if gpu else CPU_ONLY, **ENGINES)
    device = f"cuda:{gpu.index}" if gpu else "cpu"
    (problem,) = here.engine_problems(device, kind, precision)
    assert fault in problem.fault
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("gpu", "kind", "precision"),
    [(L4, "tensorrt", "fp8"), (RTX_3090, "tensorrt", "bf16"), (T4, "tensorrt", "fp16"),
     (None, "onnxruntime", "fp8")],
)  # fmt: skip
def test_engines_run_where_they_can(gpu: Gpu | None, kind: str, precision: str) -> None:
    here = dataclasses.replace(with_gpu(gpu) if gpu else CPU_ONLY, **ENGINES)
    device = f"cuda:{gpu.index}" if gpu else "cpu"
    assert here.engine_problems(device, kind, precision) == []


def test_packages_of_the_engines_that_are_missing_are_named() -> None:
    here = dataclasses.replace(CPU_ONLY, **{**ENGINES, "onnx": None, "tensorrt": None})
    (problem,) = here.engine_problems("cpu", "onnxruntime", "fp8")
    assert problem.fault == 'engine.kind = "onnxruntime" needs onnx, which is not installed'
    assert "hasten[tensorrt]" in problem.fix
    here = dataclasses.replace(here, onnxscript=None)
    assert here.engine_problems("cpu", "onnxruntime", "fp8", exported=True) == [problem]
    runner = dataclasses.replace(with_gpu(L4), tensorrt="1.7")
    assert runner.engine_problems("cuda:1", "tensorrt", "fp8", exported=True) == []
    here = dataclasses.replace(here, onnxscript="1.0")
    faults = [problem.fault for problem in here.engine_problems("cpu", "tensorrt", "fp8")]
    assert "needs tensorrt, onnx, which is not installed" in faults[0]
    assert len(faults) == 2
