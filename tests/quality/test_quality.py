"""What holds of every metric: the laws and the refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten import quality
from hasten.errors import InputError
from hasten.quality import LPIPS_MIN_SIDE, MS_SSIM_MIN_SIDE, lpips, ms_ssim, psnr, ssim

Picture = Callable[..., Tensor]

Metric = Callable[[Tensor, Tensor], Tensor]
PERFECT: dict[Metric, float] = {psnr: 100.0, ssim: 1.0, ms_ssim: 1.0, lpips: 0.0}
MIN_SIDE: dict[Metric, int] = {psnr: 1, ssim: 11, ms_ssim: MS_SSIM_MIN_SIDE, lpips: LPIPS_MIN_SIDE}
SMALL = [psnr, ssim, lpips]
every_metric = pytest.mark.parametrize("metric", PERFECT, ids=lambda metric: metric.__name__)
every_small_metric = pytest.mark.parametrize("metric", SMALL, ids=lambda metric: metric.__name__)


def side(metric: Metric) -> int:
    """A side every metric takes at a sensible cost."""
    return max(MIN_SIDE[metric], 48)


def pair(metric: Metric, picture: Picture, n: int = 3) -> tuple[Tensor, Tensor]:
    reference = picture(side(metric), side(metric) + 5, n=n, seed=3)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    return (reference + 0.05 * noise).clamp(0, 1), reference


def test_public_names() -> None:
    assert sorted(quality.__all__) == quality.__all__
    assert all(hasattr(quality, name) for name in quality.__all__)
    assert {metric.__name__ for metric in PERFECT} <= set(quality.__all__)


@every_metric
def test_n_pairs_give_n_finite_float32_values(metric: Metric, picture: Picture) -> None:
    for n in (1, 3):
        values = metric(*pair(metric, picture, n))
        assert values.shape == (n,)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        assert PERFECT[metric] not in values.tolist()


@every_metric
def test_identical_images_are_perfect(metric: Metric, picture: Picture) -> None:
    height = side(metric)
    for images in (
        picture(height, height, n=2),
        torch.rand(3, 3, height, height + 9),
        torch.zeros(1, 3, height, height),
        torch.ones(1, 3, height, height),
        torch.full((1, 3, height, height), 0.3),
    ):
        assert metric(images, images.clone()).tolist() == [PERFECT[metric]] * len(images)


@every_small_metric
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 4),
    height=st.integers(LPIPS_MIN_SIDE, 48),
    width=st.integers(LPIPS_MIN_SIDE, 48),
)
def test_laws(metric: Metric, seed: int, n: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, n, 3, height, width, generator=generator)
    values = metric(a, b)
    # Symmetric, exactly: every formula is.
    assert torch.equal(metric(b, a), values)
    # A pair's value does not depend on its batch.
    order = torch.randperm(n, generator=generator)
    torch.testing.assert_close(metric(a[order], b[order]), values[order], rtol=1e-5, atol=1e-6)
    alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(n)])
    torch.testing.assert_close(alone, values, rtol=1e-5, atol=1e-6)
    # Identity, also inside a batch that holds another pair.
    assert metric(torch.cat([a, a]), torch.cat([a, b]))[:n].tolist() == [PERFECT[metric]] * n


def test_ms_ssim_symmetry_and_batch(picture: Picture) -> None:
    a, b = pair(ms_ssim, picture)
    values = ms_ssim(a, b)
    assert torch.equal(ms_ssim(b, a), values)
    assert torch.equal(torch.cat([ms_ssim(a[i : i + 1], b[i : i + 1]) for i in range(3)]), values)


@every_metric
def test_more_noise_is_worse(metric: Metric, picture: Picture) -> None:
    reference = 0.3 + 0.4 * picture(side(metric), side(metric), n=2)
    noise = 2 * torch.rand(reference.shape, generator=torch.Generator().manual_seed(1)) - 1
    values = torch.stack(
        [metric(reference + t * noise, reference) for t in (0.0, 0.01, 0.03, 0.1, 0.3)]
    )
    steps = values.diff(dim=0)
    assert (steps > 0).all() if metric is lpips else (steps < 0).all()


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_computed_in_float32(
    metric: Metric, dtype: torch.dtype, picture: Picture
) -> None:
    a, b = (images.to(dtype) for images in pair(metric, picture))
    values = metric(a, b)
    assert values.dtype == torch.float32
    assert torch.equal(values, metric(a.float(), b.float()))
    assert torch.equal(metric(a, b.float()), values)


@every_metric
def test_inputs_are_left_alone(metric: Metric, picture: Picture) -> None:
    a, b = pair(metric, picture)
    before = a.clone(), b.clone()
    metric(a, b)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@every_metric
def test_memory_layout_changes_no_value(metric: Metric, picture: Picture) -> None:
    a, b = pair(metric, picture)
    moved = metric(a.contiguous(memory_format=torch.channels_last), b)
    torch.testing.assert_close(moved, metric(a, b), rtol=1e-5, atol=1e-6)


@every_metric
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_other_types_are_refused(metric: Metric, dtype: torch.dtype) -> None:
    images = torch.ones(1, 3, 200, 200)
    with pytest.raises(InputError) as refusal:
        metric(images, images.to(dtype))
    assert refusal.value.faults == (
        f"{metric.__name__}: reference has dtype {dtype}, not a float type",
    )
    assert "images.float() / 255" in refusal.value.fix


@every_metric
def test_every_fault_of_a_kind_is_named(metric: Metric) -> None:
    with pytest.raises(InputError) as refusal:
        metric([0.5], None)  # type: ignore[arg-type]
    assert refusal.value.faults == (
        f"{metric.__name__}: candidate is of type list, not a torch tensor",
        f"{metric.__name__}: reference is of type NoneType, not a torch tensor",
    )


@every_metric
@pytest.mark.parametrize(
    "shape", [(), (200, 200), (3, 200, 200), (1, 1, 200, 200), (1, 4, 200, 200), (1, 200, 200, 3)]
)
def test_other_shapes_are_refused(metric: Metric, shape: tuple[int, ...]) -> None:
    images = torch.ones(shape)
    with pytest.raises(InputError, match="not N×3×H×W") as refusal:
        metric(images, images)
    assert len(refusal.value.faults) == 2
    assert "unsqueeze(0)" in refusal.value.fix


@every_metric
def test_an_empty_batch_is_refused(metric: Metric) -> None:
    images = torch.ones(0, 3, 200, 200)
    with pytest.raises(InputError, match="at least one image"):
        metric(images, images)


@every_metric
@pytest.mark.parametrize("shape", [(2, 3, 200, 200), (1, 3, 200, 201)])
def test_unequal_shapes_are_refused_not_broadcast(metric: Metric, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="candidate is 1×3×200×200") as refusal:
        metric(torch.ones(1, 3, 200, 200), torch.ones(shape))
    assert "same size" in refusal.value.fix


@every_metric
def test_unequal_devices_are_refused(metric: Metric) -> None:
    images = torch.ones(1, 3, 200, 200)
    with pytest.raises(InputError, match="candidate is on cpu, reference is on meta") as refusal:
        metric(images, images.to("meta"))
    assert "candidate.to(reference.device)" in refusal.value.fix


@every_metric
@pytest.mark.parametrize("value", [-1.0, -2e-6, 1 + 3e-6, 255.0, float("nan"), float("inf")])
def test_values_outside_the_range_are_refused(metric: Metric, value: float) -> None:
    images = torch.full((2, 3, 200, 200), 0.5)
    bad = images.clone()
    bad[1, 2, 199, 199] = value
    with pytest.raises(InputError, match=r"candidate spans .* not \[0, 1\]") as refusal:
        metric(bad, images)
    assert "(x + 1) / 2" in refusal.value.fix
    with pytest.raises(InputError, match="reference spans"):
        metric(images, bad)


@every_metric
def test_rounding_at_the_ends_of_the_range_passes(metric: Metric) -> None:
    images = torch.full((1, 3, 200, 200), 0.5)
    images[0, 0, 0, :2] = torch.tensor([-5e-7, 1 + 5e-7])
    assert metric(images, images).tolist() == [PERFECT[metric]]


@every_metric
def test_the_smallest_side_is_taken_and_the_next_refused(metric: Metric) -> None:
    smallest = MIN_SIDE[metric]
    images = torch.rand(1, 3, smallest, smallest + 30)
    assert metric(images, images).shape == (1,)
    if smallest > 1:
        with pytest.raises(InputError, match=f"each side must be at least {smallest}"):
            metric(images[:, :, 1:], images[:, :, 1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_metric
def test_a_gpu_gives_the_same_values(metric: Metric, picture: Picture) -> None:
    a, b = pair(metric, picture, n=4)
    found = metric(a.cuda(), b.cuda())
    assert found.is_cuda
    # LPIPS convolutions may run in TF32 there.
    tolerance = 1e-4 if metric is lpips else 1e-5
    torch.testing.assert_close(found.cpu(), metric(a, b), rtol=1e-5, atol=tolerance)
    # Fused multiply-adds may round twice the covariance unlike the sum of the variances.
    perfect = torch.full((4,), PERFECT[metric])
    torch.testing.assert_close(metric(a.cuda(), a.cuda()).cpu(), perfect, rtol=2e-7, atol=0)
