"""Where a benchmark runs, looked at in a process of its own.

Asking torch about a GPU holds memory on it, which every row would miss; so the parent never does:
`python -m hasten.benchmark.environment MODEL DEVICE DTYPE` prints `Surroundings` as JSON and ends.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

import hasten
from hasten.errors import HastenError, UnsupportedError
from hasten.machine import machine
from hasten.process import bound_command, python_environment
from hasten.results import Environment


class Surroundings(BaseModel):
    """The environment, what `auto` means in it, and why `device` cannot be used, if so; `too_large`
    has a fault and a fix where the model takes more memory than there is."""

    environment: Environment
    device: str
    dtype: str
    fault: str | None = None
    fix: str = ""
    too_large: tuple[str, str] | None = None


def look(model: str, device: str, dtype: str) -> Surroundings:
    """Look around from this process. Imports torch and initialises CUDA where there is one."""
    import torch

    here = machine()
    device = here.device_named(device)
    gpu = here.gpu(device)
    problem = here.device_problem(device)
    return Surroundings(
        environment=Environment(
            device=device,
            torch=here.torch,
            diffusers=here.diffusers or "none",
            hasten=hasten.__version__,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            cuda=here.cuda,
            commit=commit(),
            python=here.python,
            transformers=here.transformers,
            os=here.os,
            cpu=f"{here.cpu}, {here.cores} cores",
            threads=torch.get_num_threads(),
            gpu=gpu.name if gpu else None,
            gpu_memory_bytes=gpu.memory_bytes if gpu else None,
            driver=here.driver,
        ),
        device=device,
        dtype=here.default_dtype(device) if dtype == "auto" else dtype,
        fault=problem.fault if problem else None,
        fix=problem.fix if problem else "",
        too_large=None if problem else _too_large(model, device, dtype),
    )


def _too_large(model: str, device: str, dtype: str) -> tuple[str, str] | None:
    from hasten.models.load import check_loadable

    try:
        check_loadable(model, device, dtype)
    except UnsupportedError as error:
        return error.faults[0], error.fix
    return None


def look_in_process(model: str, device: str, dtype: str) -> Surroundings:
    """`look`, from a process that ends. Raises HastenError where torch cannot be imported."""
    done = subprocess.run(
        bound_command("hasten.benchmark.environment", model, device, dtype),
        env=python_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise HastenError(
            f"looking at this machine failed: {last_line}",
            "check that `python -c 'import torch'` works; `hasten doctor` says more",
        )
    return Surroundings.model_validate_json(done.stdout.splitlines()[-1])


def commit() -> str | None:
    """Git commit of the hasten that is running, `-dirty` where its files have changed.

    None where it is no checkout; that its folder lies inside one (a virtual environment in
    somebody's repository) does not count.
    """
    package = Path(hasten.__file__)
    if _git(package.parent, "ls-files", "--error-unmatch", package.name) is None:
        return None
    head = _git(package.parent, "rev-parse", "HEAD")
    changed = _git(package.parent, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{head}-dirty" if head and changed else head


def host() -> str:
    """A short name for this machine that does not give its host name away."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    print(look(*sys.argv[1:]).model_dump_json())
