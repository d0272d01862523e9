"""Capabilities of this machine, for `check`, the loader and `hasten doctor`.

`Machine` is plain data, so tests can construct any machine; `machine()` inspects the real one.
Importing this module does not import torch or touch an accelerator; calling `machine()` does.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hasten.errors import InputError, Problem
from hasten.memory import memory_limits
from hasten.quantization.schemes import OLDEST_FP8, OLDEST_INT8, SCHEMES

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that a model can be loaded in, by torch's names."""

# Triton's oldest supported NVIDIA generation (Volta).
OLDEST_TRITON_CAPABILITY = (7, 0)
OLDEST_BF16_CAPABILITY = (8, 0)
# GPUs that TensorRT for RTX 1.7 builds for: Turing, Ampere, Ada, Blackwell; no Hopper, no B200.
RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
ENGINE_PACKAGES = ("tensorrt", "modelopt", "onnx", "onnxscript", "onnxruntime")
INSTALL_COMPILER = "apt-get install g++ python3-dev (Debian/Ubuntu)"


@dataclass(frozen=True)
class Gpu:
    """One CUDA device.

    Attributes:
        index: Torch's device index.
        name: The product name.
        capability: Compute capability as (major, minor), e.g. (9, 0).
        memory_bytes: Total device memory.
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """Software and hardware of a machine. Whatever is missing is None, False or empty.

    Attributes:
        cores: Cores that this process may use.
        ram_bytes: Host memory available to this process; None if unknown.
        gpus: The CUDA devices.
        torch_architectures: GPU generations that torch was built for, e.g. ("sm_80", "sm_90").
        mps: Whether torch supports an Apple GPU here.
        cxx_compiler: Absolute path of the C++ compiler that torch.compile uses on the CPU.
        c_compiler: Absolute path of the C compiler that Triton uses to build its launchers.
        python_headers: Whether Python.h is installed.
        fp8_on_cpu: Whether torch's scaled FP8 product gives the right result on this CPU.

    The other attributes are versions: of packages, Python, CUDA and the NVIDIA driver.
    """

    python: str
    os: str
    cpu: str
    cores: int
    ram_bytes: int | None
    torch: str
    cuda: str | None = None
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    torch_architectures: tuple[str, ...] = ()
    mps: bool = False
    diffusers: str | None = None
    transformers: str | None = None
    accelerate: str | None = None
    triton: str | None = None
    tensorrt: str | None = None
    modelopt: str | None = None
    onnx: str | None = None
    onnxscript: str | None = None
    onnxruntime: str | None = None
    cxx_compiler: str | None = None
    c_compiler: str | None = None
    python_headers: bool = False
    fp8_on_cpu: bool = False

    def default_device(self) -> str:
        """The device for `auto`: the first CUDA device, else the CPU. MPS has to be requested."""
        return "cuda" if self.gpus else "cpu"

    def device_named(self, name: str) -> str:
        """Resolve `auto` to the default device; return any other name unchanged."""
        return self.default_device() if name == "auto" else name

    def usable_device(self, name: str) -> str:
        """Like `device_named`, but the device is checked.

        Raises:
            InputError: Nothing can run on the device.
        """
        device = self.device_named(name)
        problem = self.device_problem(device)
        if problem is not None:
            raise InputError(*problem)
        return device

    def default_dtype(self, device: str) -> str:
        """The dtype for `auto` on `device`, by its torch name."""
        gpu = self.gpu(device)
        if gpu is None:
            return "float32"
        return "bfloat16" if gpu.capability >= OLDEST_BF16_CAPABILITY else "float16"

    def gpu(self, device: str) -> Gpu | None:
        """The GPU named `cuda` or `cuda:N`; None if there is none."""
        kind, _, index = device.partition(":")
        if kind != "cuda":
            return None
        return next((gpu for gpu in self.gpus if gpu.index == int(index or 0)), None)

    def device_problem(self, device: str) -> Problem | None:
        """Why nothing can run on `device` (`cpu`, `cuda`, `cuda:N`, `mps`); None if it works."""
        if re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", device) is None:
            return Problem(
                f"device {device!r} is not one of cpu, cuda, cuda:N, mps",
                f"use {self.default_device()}, or auto",
            )
        if device.startswith("cuda"):
            return self._cuda_problem(device)
        if device == "mps" and not self.mps:
            return Problem("device mps: torch finds no Apple GPU", "use cpu, or auto")
        return None

    def _cuda_problem(self, device: str) -> Problem | None:
        if self.cuda is None and not self.gpus:
            return Problem(
                f"device {device}: torch {self.torch} is built without CUDA",
                "install a CUDA build of torch (see pytorch.org), or use cpu",
            )
        if not self.gpus:
            return Problem(
                f"device {device}: torch finds no CUDA device",
                "check that nvidia-smi works and CUDA_VISIBLE_DEVICES is right, or use cpu",
            )
        gpu = self.gpu(device)
        if gpu is None:
            visible = ", ".join(f"cuda:{gpu.index}" for gpu in self.gpus)
            return Problem(f"device {device}: there is no such GPU", f"use one of {visible}")
        if not self._torch_built_for(gpu.capability):
            return Problem(
                f"device {device}: torch {self.torch} has no kernels for {gpu.name} "
                f"(sm_{gpu.capability[0]}{gpu.capability[1]})",
                f"install a torch build that has them; this one has "
                f"{', '.join(self.torch_architectures)}",
            )
        return None

    def _torch_built_for(self, capability: tuple[int, int]) -> bool:
        """Whether torch has code for this GPU.

        Binary code runs on later minor versions of its major version; PTX (`compute_`) runs on
        every later version.
        """
        built_for = [
            (kind, divmod(int(number), 10))
            for kind, number in re.findall(
                r"\b(sm|compute)_(\d+)", " ".join(self.torch_architectures)
            )
        ]
        return not built_for or any(
            built <= capability and (kind == "compute" or built[0] == capability[0])
            for kind, built in built_for
        )

    def compile_problem(self, device: str) -> Problem | None:
        """Why torch.compile cannot work on `device`; None if it can."""
        problem = self.device_problem(device)
        if problem is not None:
            return problem
        if device == "mps":
            return Problem(
                "torch.compile on mps is not tested with hasten",
                "use a recipe without [compile], or --device cpu",
            )
        return self._cpu_compile_problem() if device == "cpu" else self._triton_problem(device)

    def quantize_problem(
        self, device: str, scheme: str, *, emulate: bool = False, compiled: bool = False
    ) -> Problem | None:
        """Why linears cannot be quantised on `device`; None if they can.

        Args:
            device: A device name.
            scheme: The recipe's `quantize.scheme`.
            emulate: The recipe's `quantize.emulate`.
            compiled: Whether torch.compile will compile the linears.
        """
        if device == "mps":
            return Problem(
                "[quantize] on mps is not tested with hasten",
                "use a recipe without [quantize], or --device cpu",
            )
        gpu = self.gpu(device)
        if gpu is None:
            works = emulate or scheme != "fp8" or self.fp8_on_cpu
            return None if works else self._no_cpu_fp8_problem()
        if emulate or not SCHEMES[scheme].activations:
            uncompilable = compiled and scheme.startswith("fp8")
            return _old_triton_problem(gpu, scheme) if uncompilable else None
        return _old_gpu_problem(gpu, scheme)

    def engine_problems(
        self, device: str, kind: str, precision: str, *, exported: bool = False
    ) -> list[Problem]:
        """Why `[engine]` cannot run on `device`; empty if it can.

        Args:
            device: A device name.
            kind: The recipe's `engine.kind`.
            precision: The recipe's `engine.precision`.
            exported: Whether the export exists, so that the packages that make one are not needed.
        """
        unneeded = {"tensorrt"} if kind == "onnxruntime" else set()
        if exported and kind == "tensorrt":
            unneeded = {*ENGINE_PACKAGES} - {"tensorrt"}
        elif exported:
            unneeded |= {"modelopt", "onnxscript"}  # the float32 graph is made with onnx
        missing = [name for name in self.missing_for_engines() if name not in unneeded]
        problems = []
        if missing:
            problems.append(
                Problem(
                    f'engine.kind = "{kind}" needs {", ".join(missing)}, which is not installed',
                    "pip install 'hasten[tensorrt]'",
                )
            )
        get_one = "run it" if exported else "build one with `hasten export tensorrt` and run it"
        if kind == "tensorrt" and (problem := self._rtx_problem(device, precision, get_one)):
            problems.append(problem)
        if kind == "onnxruntime" and device != "cpu":
            problems.append(
                Problem(
                    f'engine.kind = "onnxruntime" runs on the CPU, and this is {device}',
                    "use --device cpu",
                )
            )
        return problems

    def missing_for_engines(self) -> list[str]:
        """The packages of `hasten[tensorrt]` that are not installed."""
        return [name for name in ENGINE_PACKAGES if getattr(self, name) is None]

    def _rtx_problem(self, device: str, precision: str, get_one: str) -> Problem | None:
        """Why TensorRT for RTX has no engine for `device`.

        `get_one` is the advice to follow on a machine with such a GPU.
        """
        gpu = self.gpu(device)
        if gpu is None:
            return Problem(
                f"a TensorRT engine runs on an RTX GPU, and this is {device}",
                f"{get_one} on such a GPU, or run its graph on the CPU to measure quality (not "
                'speed): engine.kind = "onnxruntime" (`hasten bench` reports it in its own row)',
            )
        if gpu.capability not in RTX_CAPABILITIES:
            return Problem(
                f"TensorRT for RTX has no engines for {gpu.name} (compute capability "
                f"{_dotted(gpu.capability)})",
                "use the preset fp8 or lossless, which need no engine",
            )
        needed = {"fp8": OLDEST_FP8, "bf16": OLDEST_BF16_CAPABILITY}.get(precision)
        if needed is None or gpu.capability >= needed:
            return None
        return Problem(
            f'engine.precision = "{precision}" needs compute capability {_dotted(needed)} or '
            f"later; {gpu.name} has {_dotted(gpu.capability)}",
            'set engine.precision = "bf16"'
            if gpu.capability >= OLDEST_BF16_CAPABILITY
            else 'set it to "fp16"',
        )

    def _no_cpu_fp8_problem(self) -> Problem:
        return Problem(
            f'quantize.scheme = "fp8": torch {self.torch} has no FP8 product on this CPU',
            'set emulate = true for the same images, or scheme = "int8" or "fp8-weight"',
        )

    def _cpu_compile_problem(self) -> Problem | None:
        if self.cxx_compiler is None:
            return Problem(
                "torch.compile needs a C++ compiler, and none was found "
                f"(looked for {_looked_for('CXX', inductor_compiler())})",
                f"{INSTALL_COMPILER}, or set CXX to the path of a compiler you have",
            )
        return self._headers_problem()

    def _triton_problem(self, device: str) -> Problem | None:
        gpu = self.gpu(device)
        if gpu is not None and gpu.capability < OLDEST_TRITON_CAPABILITY:
            return Problem(
                f"torch.compile needs a GPU of compute capability 7.0 or later; {gpu.name} "
                f"has {_dotted(gpu.capability)}",
                "use a recipe without [compile]",
            )
        if self.triton is None:
            return Problem(
                "torch.compile needs Triton, which is not installed", "pip install triton"
            )
        if self.c_compiler is None:
            return Problem(
                "torch.compile needs a C compiler (for Triton), and none was found "
                f"(looked for {_looked_for('CC', 'gcc, clang')})",
                INSTALL_COMPILER,
            )
        return self._headers_problem()

    def _headers_problem(self) -> Problem | None:
        if self.python_headers:
            return None
        return Problem(
            "torch.compile needs the Python headers, and there is no Python.h in "
            f"{sysconfig.get_path('include')}",
            INSTALL_COMPILER,
        )


def _old_gpu_problem(gpu: Gpu, scheme: str) -> Problem | None:
    """Why this GPU cannot multiply the codes of `scheme` ("fp8" or "int8")."""
    needed = SCHEMES[scheme].oldest_gpu
    if needed is None or gpu.capability >= needed:
        return None
    alternative = 'scheme = "int8-weight"'
    if gpu.capability >= OLDEST_INT8:
        alternative = 'scheme = "int8" (as in the preset "int8")'
    return Problem(
        f'quantize.scheme = "{scheme}" needs a GPU of compute capability {_dotted(needed)} or '
        f"later; {gpu.name} has {_dotted(gpu.capability)}",
        f"set {alternative}, or emulate = true for the same images without a speed-up",
    )


def _old_triton_problem(gpu: Gpu, scheme: str) -> Problem | None:
    """Why torch.compile cannot convert FP8 on this GPU: Triton does not support the type there."""
    if gpu.capability >= OLDEST_FP8:
        return None
    return Problem(
        f"torch.compile cannot convert FP8 on {gpu.name}: that needs compute capability "
        f"{_dotted(OLDEST_FP8)}, it has {_dotted(gpu.capability)}",
        f'set scheme = "{scheme.replace("fp8", "int8")}", or remove [compile]',
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def check_dtype(name: str) -> None:
    """Check a dtype's name.

    Raises:
        InputError: `name` is neither `auto` nor one of `DTYPES`.
    """
    if name not in ("auto", *DTYPES):
        raise InputError(f"{name!r} is not a dtype", f"use auto, {', '.join(DTYPES)}")


@functools.cache
def machine() -> Machine:
    """Inspect this machine, once per process. Imports torch and initialises CUDA if available."""
    import torch

    gpus = tuple(_gpus())
    return Machine(
        python=platform.python_version(),
        os=platform.platform(),
        cpu=_cpu_name(),
        cores=_cores(),
        ram_bytes=_ram_bytes(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=_nvidia_driver(),
        gpus=gpus,
        torch_architectures=tuple(torch.cuda.get_arch_list()) if gpus else (),
        mps=torch.backends.mps.is_available(),
        diffusers=version_of("diffusers"),
        transformers=version_of("transformers"),
        accelerate=version_of("accelerate"),
        triton=version_of("triton") or version_of("pytorch-triton"),
        tensorrt=version_of("tensorrt_rtx_cu13"),
        modelopt=version_of("nvidia-modelopt"),
        onnx=version_of("onnx"),
        onnxscript=version_of("onnxscript"),
        onnxruntime=version_of("onnxruntime"),
        cxx_compiler=_working(inductor_compiler()),
        c_compiler=_c_compiler(),
        python_headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        fp8_on_cpu=_fp8_on_cpu(),
    )


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is not installed. Imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def inductor_compiler() -> str:
    """The C++ compiler that torch.compile uses on the CPU (torch/_inductor/config.py, cpp.cxx)."""
    return os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))


def _c_compiler() -> str | None:
    """The C compiler that Triton uses (triton/runtime/build.py)."""
    if "CC" in os.environ:
        return _working(os.environ["CC"])
    return _working("gcc") or _working("clang")


def _working(program: str) -> str | None:
    """Absolute path of `program` if `program --version` exits with 0."""
    path = shutil.which(program)
    if path is None:
        return None
    flag = "/help" if Path(path).stem == "cl" else "--version"
    try:
        subprocess.run([path, flag], capture_output=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return path


def _looked_for(variable: str, default: str) -> str:
    value = os.environ.get(variable)
    return f"${variable} = {value!r}" if value is not None else f"${variable}, {default}"


def _fp8_on_cpu() -> bool:
    """Whether torch multiplies FP8 codes with one scale per row on this CPU; one small product."""
    import torch

    ones = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.full((16, 1), 0.5)
    try:
        product = torch._scaled_mm(
            ones, ones.t(), scale, scale.t(), out_dtype=torch.float32, use_fast_accum=True
        )
    except (RuntimeError, TypeError):
        return False
    return bool((product == 4).all())


def _gpus() -> list[Gpu]:
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        gpus.append(Gpu(index, properties.name, capability, properties.total_memory))
    return gpus


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use; in a container, they may be fewer than the host has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ram_bytes() -> int | None:
    """Physical memory, or the limit of the container if it is lower."""
    if not hasattr(os, "sysconf"):
        return None
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *memory_limits()])


def _nvidia_driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text("utf-8").strip()
    except OSError:
        return None
