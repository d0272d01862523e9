"""Detects the environment of a benchmark in a separate process.

Querying a GPU through torch allocates memory on it, which the rows would then lack. The parent
process therefore never does it: `python -m hasten.benchmark.environment MODEL DEVICE DTYPE`
prints a `DetectedEnvironment` as JSON and ends.
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


class DetectedEnvironment(BaseModel):
    """The environment of a benchmark.

    Attributes:
        environment: Hardware and versions, as in `results.json`.
        device: The requested device, with `auto` resolved.
        dtype: The requested dtype, with `auto` resolved.
        fault: Why the device cannot be used; None if it can.
        fix: What to do about the fault.
        too_large: Fault and fix if the model does not fit in memory; None if it does.
    """

    environment: Environment
    device: str
    dtype: str
    fault: str | None = None
    fix: str = ""
    too_large: tuple[str, str] | None = None


def detect(model: str, device: str, dtype: str) -> DetectedEnvironment:
    """Detect the environment in this process. Imports torch and initialises CUDA if available."""
    import torch

    here = machine()
    device = here.device_named(device)
    gpu = here.gpu(device)
    problem = here.device_problem(device)
    return DetectedEnvironment(
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


def detect_in_process(model: str, device: str, dtype: str) -> DetectedEnvironment:
    """`detect`, in a child process.

    Raises:
        HastenError: The process failed, for example because torch cannot be imported.
    """
    done = subprocess.run(
        bound_command("hasten.benchmark.environment", model, device, dtype),
        env=python_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["no error output"])[-1]
        raise HastenError(
            f"detecting the environment failed: {last_line}",
            "check that `python -c 'import torch'` works; `hasten doctor` has details",
        )
    return DetectedEnvironment.model_validate_json(done.stdout.splitlines()[-1])


def commit() -> str | None:
    """The git commit of the running hasten, with `-dirty` appended if its files have changed.

    None if hasten does not run from a checkout. A virtual environment inside another repository is
    not a checkout.
    """
    package = Path(hasten.__file__)
    if _git(package.parent, "ls-files", "--error-unmatch", package.name) is None:
        return None
    head = _git(package.parent, "rev-parse", "HEAD")
    changed = _git(package.parent, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{head}-dirty" if head and changed else head


def host() -> str:
    """A short identifier of this machine that does not reveal its host name."""
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
    print(detect(*sys.argv[1:]).model_dump_json())
