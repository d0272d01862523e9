"""`hasten doctor`: what works on this machine, what does not, and the fix.

Every line comes from trying the thing, not from guessing: imports are imported, the compiler
compiles. What takes long or needs the network is tried only on request.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hasten.cli.options import Debug, Json, with_call
from hasten.errors import HastenError, InputError, Problem, join_fixes, one_line, unsupported
from hasten.memory import format_bytes

if TYPE_CHECKING:
    from hasten.machine import Machine
    from hasten.settings import CallOptions

REINSTALL = "the installation is incomplete: install hasten again"
REQUIRED = ("diffusers", "bundled model")  # without which hasten cannot work
GATED_MODEL = "black-forest-labs/FLUX.1-dev"
# What torch.compile builds for the CPU: a shared library that uses Python and OpenMP.
PROBE = """#include <Python.h>
#include <omp.h>
extern "C" int probe() { return omp_get_max_threads() + PY_MAJOR_VERSION; }
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; where it is `required` and `no`, the command fails."""

    subject: str
    status: Literal["ok", "no", "not checked"]
    detail: str
    fix: str = ""
    required: bool = False


@with_call("model")
def doctor(
    *,
    call: CallOptions,
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="Also load the bundled model and compile (about 30 s)."),
    ] = False,
    hub: Annotated[
        bool, typer.Option("--hub", help="Also ask the model hub for access to FLUX.1-dev.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what works on this machine, what does not, the fix, and which preset to start with."""
    from hasten.cli.terminal import ProgressBar

    with ProgressBar() as progress:
        progress.stage("importing torch")
        from hasten.machine import machine

        here = machine()
        findings = []
        for subject, look in _checks(here, call.model, thorough=thorough, hub=hub):
            progress.stage(subject)
            findings.append(_finding(subject, look))
    if not hub:
        detail = "only needed for hub models; --hub checks"
        findings.append(Finding("model hub", "not checked", detail))
    start = _start_with(here, call.model, {finding.subject: finding.status for finding in findings})
    if as_json:
        shown = [asdict(finding) for finding in findings]
        for finding in shown:
            finding["what"] = finding.pop("subject")  # the name that scripts read
        data = {"machine": asdict(here), "findings": shown}
        print(json.dumps(data | {"start_with": start}, indent=2))
    else:
        _print(here, findings)
        if start:
            print(f"\nstart with: {shlex.join(start)}")
    broken = [finding for finding in findings if finding.required and finding.status == "no"]
    if broken:
        raise unsupported(
            (f"{finding.subject}: {finding.detail}", finding.fix) for finding in broken
        )


Look = Callable[[], str | Problem]  # what works, or why it does not


def _start_with(here: Machine, model: str, statuses: dict[str, str]) -> list[str]:
    """The command to begin with: the best preset for this machine that works; none, no command."""
    from hasten.presets import TO_START_WITH
    from hasten.recipe import resolve

    device = here.default_device()
    compiles = statuses[f"torch.compile ({device})"] == "ok"  # it compiled something, if --thorough
    if "no" in (statuses.get("diffusers"), statuses.get("bundled model"), statuses.get("model")):
        return []
    works = [
        name
        for name in (*TO_START_WITH[device], "cache")
        if statuses[f"recipe {name}"] == "ok" and (compiles or not resolve(name).compiles)
    ]
    of_model = [] if model == "tiny" else ["--model", model]
    return ["hasten", "generate", "a rocket", *of_model, "--recipe", works[0]]


def _checks(here: Machine, model: str, *, thorough: bool, hub: bool) -> Iterator[tuple[str, Look]]:
    """What to look at, in order."""
    from hasten.recipe import preset_names

    device = here.default_device()
    yield "diffusers", _diffusers
    yield "gpu", lambda: _gpu(here)
    yield f"torch.compile ({device})", lambda: _compile(here, device, thorough=thorough)
    yield "tensorrt", lambda: _tensorrt(here, device)
    yield "bundled model", lambda: _bundled_model(thorough=thorough)
    if model != "tiny":
        yield "model", lambda: _model(model, device)
    for name in preset_names():
        yield f"recipe {name}", partial(_preset, name, here, device)
    if hub:
        yield "model hub", _hub


def _finding(subject: str, look: Look) -> Finding:
    """What `look` returns; an error of hasten's own is a finding as well."""
    required = subject in REQUIRED
    try:
        outcome = look()
    except HastenError as error:
        return Finding(subject, "no", "; ".join(error.faults), error.fix, required=True)
    if isinstance(outcome, Problem):
        return Finding(subject, "no", outcome.fault, outcome.fix, required)
    return Finding(subject, "ok", outcome, required=required)


def _diffusers() -> str | Problem:
    try:
        from diffusers import FluxPipeline
        from transformers import CLIPTextModel, T5EncoderModel
    except Exception as error:  # a broken installation can fail in any way
        fix = "pip install --upgrade diffusers transformers accelerate"
        return Problem(f"import fails: {one_line(str(error), 200)}", fix)
    names = ", ".join(kind.__name__ for kind in (FluxPipeline, T5EncoderModel, CLIPTextModel))
    return f"{names} import"


def _gpu(here: Machine) -> str | Problem:
    problem = here.device_problem("cuda")
    if problem is not None:
        return Problem(f"{problem.fault}; everything runs on the CPU", problem.fix)
    import torch

    for gpu in here.gpus:
        device = f"cuda:{gpu.index}"
        ones = torch.ones(64, 64, device=device, dtype=torch.float16)
        if (ones @ ones).float().sum().item() != 64.0**3:
            return Problem(f"{device} computes wrong sums", "reboot it")
    return ", ".join(gpu.name for gpu in here.gpus)


def _compile(here: Machine, device: str, *, thorough: bool) -> str | Problem:
    problem = here.compile_problem(device)
    if problem is None and device == "cpu" and sys.platform == "linux":
        problem = compiler_problem(str(here.cxx_compiler))
    if problem is not None:
        return problem
    if not thorough:
        compiler = here.cxx_compiler if device == "cpu" else f"triton {here.triton}"
        return f"{compiler} (--thorough compiles something)"
    import torch

    try:
        compiled: Any = torch.compile(_sum_of_cosines)
        value = compiled(torch.zeros(32, 32, device=device)).item()
    except Exception as error:  # inductor wraps whatever the compiler said
        return Problem(one_line(str(error), 200), "use recipes without [compile]")
    return (
        "compiled a function" if value == 1024 else Problem(f"wrong result: {value}, not 1024", "")
    )


def _sum_of_cosines(x: Any) -> Any:
    return x.cos().sum()


def _tensorrt(here: Machine, device: str) -> str | Problem:
    missing = here.missing_for_engines()
    if missing:
        fault = f"{', '.join(missing)} not installed: no engines, no graphs"
        return Problem(fault, "pip install 'hasten[tensorrt]'")
    running = here.engine_problems(device, "tensorrt", "fp16")
    runs = running[0].fault if running else "they run here"
    return f"TensorRT for RTX {here.tensorrt} builds engines here; {runs}{_kept_engines()}"


def _kept_engines() -> str:
    """How much the cache of exports takes, where there is one."""
    from hasten.engines.tensorrt.files import bytes_below, default_root

    try:
        root = default_root()
    except InputError:
        return ""
    taken = bytes_below(root)
    return f"; {root} holds {format_bytes(taken)}, safe to delete" if taken else ""


def compiler_problem(compiler: str) -> Problem | None:
    """Compile a four-line library as torch.compile would; None where that works."""
    with tempfile.TemporaryDirectory(prefix="hasten-doctor-") as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(PROBE, "utf-8")
        include = sysconfig.get_path("include")
        done = subprocess.run(
            [compiler, "-shared", "-fPIC", "-fopenmp", f"-I{include}", source, "-o", library],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    if done.returncode == 0:
        return None
    said = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
    return Problem(
        f"{compiler} cannot build a library with OpenMP and Python.h: {said.strip()[:200]}",
        "apt-get install g++ libgomp1 python3-dev (Debian/Ubuntu)",
    )


def _bundled_model(*, thorough: bool) -> str | Problem:
    from hasten.models.defaults import TINY_DIR

    files = sorted(TINY_DIR.rglob("*.safetensors"))
    if not (TINY_DIR / "model_index.json").is_file() or not files:
        return Problem(f"not in {TINY_DIR}", REINSTALL)
    from safetensors import SafetensorError, safe_open

    try:
        for file in files:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
    except SafetensorError as error:
        return Problem(f"{file.name}: {error}", REINSTALL)
    size = format_bytes(sum(file.stat().st_size for file in files))
    if not thorough:
        return size
    from hasten import load_pipeline, optimize
    from hasten.cli.terminal import silence_library_bars

    silence_library_bars()
    fast = optimize(load_pipeline("tiny"), "baseline")
    fast("a red circle", num_inference_steps=2)
    return f"{size}, rendered two steps"


def _model(model: str, device: str) -> str:
    from hasten.models.load import check_loadable

    check_loadable(model, device)
    return f"{model}: nothing speaks against loading it"


def _preset(name: str, here: Machine, device: str) -> str | Problem:
    from hasten.check import problems
    from hasten.recipe import resolve

    faulty = problems(resolve(name), here, device)
    if not faulty:
        return f"runs on {device}"
    faults, fixes = zip(*faulty, strict=True)
    return Problem("; ".join(faults), join_fixes(fixes))


def _hub() -> str | Problem:
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        auth_check(GATED_MODEL)
    except (GatedRepoError, RepositoryNotFoundError):
        fix = f"accept the licence on the hub page of {GATED_MODEL}, then `hf auth login`"
        return Problem(f"reachable, but no access to {GATED_MODEL}", fix)
    except Exception as error:  # every way a network can fail
        reason = one_line(str(error), 120)
        return Problem(f"not reachable: {reason}", "check the network and proxies")
    return f"access to {GATED_MODEL}"


def _print(here: Machine, findings: list[Finding]) -> None:
    from hasten.cli.terminal import print_table

    print_table(("machine", ""), _about(here))
    print()
    print_table(("check", "status", "detail"), [(f.subject, f.status, f.detail) for f in findings])
    fixes = dict.fromkeys((f.subject, f.fix) for f in findings if f.status == "no" and f.fix)
    if fixes:
        print()
        print_table(("to fix", ""), list(fixes))


def _about(here: Machine) -> list[tuple[str, str]]:
    memory = f", {here.ram_bytes / 2**30:.0f} GiB" if here.ram_bytes else ""
    rows = [
        ("system", f"{here.os}, Python {here.python}"),
        ("cpu", f"{here.cpu}, {here.cores} cores{memory}"),
        ("torch", f"{here.torch}{f', CUDA {here.cuda}' if here.cuda else ''}"),
        ("libraries", f"diffusers {here.diffusers}, transformers {here.transformers}, "
         f"accelerate {here.accelerate}, triton {here.triton or 'not installed'}"),
    ]  # fmt: skip
    for gpu in here.gpus:
        capability = ".".join(map(str, gpu.capability))
        rows.append((f"cuda:{gpu.index}", f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, "
                     f"compute {capability}, driver {here.driver or 'unknown'}"))  # fmt: skip
    return rows
