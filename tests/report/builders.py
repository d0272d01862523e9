"""Synthetic results with pictures: what a benchmark would leave behind, made in a second."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from hasten.results import (
    Environment,
    Prompt,
    PromptQuality,
    Quality,
    Results,
    Row,
    StepsComputed,
    Workload,
    summarize_quality,
    summarize_seconds,
    with_speedups,
)
from hasten.results_file import write_results

GIB = 2**30
ROLES = {
    "baseline": "baseline",
    "baseline-again": "baseline",
    "fewer-steps-18": "rival",
    "cache-dit-18": "peer",
}
CAPTIONS = [
    "a 3D render of a rocket on a blue background",
    "a red panda reading a newspaper in the rain, soft window light, 35 mm photograph",
    "a flat drawing of a teapot on a yellow background",
    "three paper lanterns above a canal at dusk",
    "an isometric city block, isolated on white",
    "a glass of water on a marble table, studio light",
]

# recipe, seconds, steps computed, LPIPS, SSIM, PSNR
MEASURED: list[tuple[str, float, int, float, float, float]] = [
    ("compile", 2.20, 50, 0.012, 0.987, 34.2),
    ("cache", 1.52, 18, 0.094, 0.912, 24.8),
    ("fewer-steps-18", 1.49, 18, 0.187, 0.835, 20.4),
    ("cache-compile", 0.86, 18, 0.096, 0.909, 24.6),
    ("max", 0.61, 12, 0.148, 0.868, 22.1),
    ("cache-dit-18", 1.03, 18, 0.121, 0.881, 23.0),
]
CACHE = '\n[cache]\nkind = "interval"\ninterval = 3\n'
SMALL_SIDES = "MS-SSIM needs sides over 160 pixels"


def picture(index: int, size: tuple[int, int], change: float = 0.0) -> Image.Image:
    """A shaded object on a gradient; `change` moves and softens it as a cheaper recipe would."""
    rng = np.random.default_rng(zlib.crc32(f"picture {index}".encode()))
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    y, x = y / height, x / width
    sky, ground = rng.uniform(40, 230, 3), rng.uniform(20, 200, 3)
    pixels = sky + (ground - sky) * (y + 0.15 * np.sin(6 * x + change * 4))[..., None]
    for _ in range(5):
        cx, cy = rng.uniform(0.2, 0.8, 2) + change * rng.uniform(-0.25, 0.25, 2)
        radius, colour = rng.uniform(0.08, 0.26), rng.uniform(0, 255, 3)
        distance = np.hypot(x - cx, y - cy) / radius
        inside = np.clip((1 - distance) * width * radius / 2, 0, 1)[..., None]
        light = np.clip(
            1.2 - 0.7 * np.hypot(x - cx + radius / 3, y - cy + radius / 3) / radius, 0, 2
        )
        pixels = pixels * (1 - inside) + inside * colour * light[..., None]
    pixels += rng.normal(0, 2.5, pixels.shape)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    edge = width // 12
    ImageDraw.Draw(image).polygon(
        [
            (width * 0.5, height * 0.3),
            (width * 0.5 - edge, height * 0.6),
            (width * 0.62, height * 0.55),
        ],
        fill=tuple(int(value) for value in rng.uniform(0, 255, 3)),
    )
    return image.filter(ImageFilter.GaussianBlur(change * width / 120)) if change else image


def save_pictures(
    directory: Path, recipe: str, count: int, size: tuple[int, int], change: float
) -> tuple[str, ...]:
    folder = directory / "images" / recipe
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for index in range(count):
        name = f"images/{recipe}/{index:03d}.png"
        # The further down, the more a recipe changes the picture: worst-first is not id order.
        picture(index, size, change * (1 + index / count)).save(directory / name)
        names.append(name)
    return tuple(names)


def samples(seconds: float, count: int) -> list[float]:
    """Spread evenly by 1 % around `seconds`, which is then the median; not in sorted order."""
    spread = np.linspace(-0.01, 0.01, count) if count > 1 else np.zeros(1)
    return [float(value) for value in np.roll(seconds * (1 + spread), 1)]


def quality(count: int, lpips: float, ssim: float, psnr: float) -> Quality:
    """Means are the arguments; single prompts spread around them, the last one worst."""
    spread = np.linspace(-0.5, 0.5, count) if count > 1 else np.zeros(1)
    return summarize_quality(
        "baseline",
        [
            PromptQuality(
                id=index,
                lpips=lpips * (1 + share),
                ssim=ssim - (1 - ssim) * share,
                psnr=psnr - 4 * share,
            )
            for index, share in enumerate(spread)
        ],
        reason=SMALL_SIDES,
    )


def measured_row(
    recipe: str, seconds: float, steps: int, count: int, images: tuple[str, ...], **extra: object
) -> Row:
    fields: dict[str, object] = {
        "recipe": recipe,
        "role": ROLES.get(recipe, "recipe"),
        "rival_of": ("cache",) if recipe == "fewer-steps-18" else (),
        "status": "ok",
        "seconds_per_image": summarize_seconds(samples(seconds, max(count, 1))),
        "transformer_ms_per_step": seconds / 50 * 950,
        "steps_computed": StepsComputed(mean=steps, min=steps, max=steps),
        "setup_seconds": 61.0 if "compile" in recipe or recipe == "max" else 2.4,
        "first_image_seconds": seconds * 1.4,
        "peak_memory_bytes": int(35.1 * GIB),
        "weights_bytes": int(31.4 * GIB),
        "images": images,
        "toml": f'name = "{recipe}"\n' + (CACHE if recipe == "cache" else ""),
    }
    return Row.model_validate(fields | extra)


def exact_quality(count: int) -> Quality:
    return summarize_quality(
        "baseline",
        [PromptQuality(id=index, lpips=0.0, ssim=1.0, psnr=100.0) for index in range(count)],
        reason=SMALL_SIDES,
    )


ENVIRONMENT = Environment(
    device="NVIDIA H100 80GB HBM3",
    torch="2.13.0+cu130",
    diffusers="0.42.1",
    hasten="0.1.0",
    cuda="13.0",
    commit="1f3c9ab",
    date="2026-11-22T21:00:00+00:00",
    python="3.11.7",
    gpu_memory_bytes=80 * GIB,
)

TENSORRT = Row(
    recipe="tensorrt-fp8",
    role="recipe",
    status="unsupported",
    reason="no TensorRT runtime on this machine; nearest that works: fp8",
)


def workload(size: tuple[int, int], captions: list[str]) -> Workload:
    return Workload(
        model="shape:flux.1-dev",
        width=size[0],
        height=size[1],
        steps=50,
        guidance=3.5,
        seed=0,
        dtype="bfloat16",
        prompt_source="hasten's own prompts",
        prompts=tuple(
            Prompt(id=index, text=text, seed=index) for index, text in enumerate(captions)
        ),
    )


def make_results(
    directory: Path,
    *,
    count: int = 3,
    size: tuple[int, int] = (64, 64),
    captions: list[str] | None = None,
    pictures: bool = True,
    extra_rows: tuple[Row, ...] = (),
) -> Results:
    """A whole benchmark written to `directory`: results.json and, where asked, its PNGs."""

    def images(recipe: str, change: float) -> tuple[str, ...]:
        return save_pictures(directory, recipe, count, size, change) if pictures else ()

    captions = captions or [CAPTIONS[index % len(CAPTIONS)] for index in range(count)]
    rows = [measured_row("baseline", 4.00, 50, count, images("baseline", 0), toml="")]
    for recipe, seconds, steps, *scores in MEASURED:
        row = measured_row(
            recipe,
            seconds,
            steps,
            count,
            images(recipe, scores[0]),
            quality=(quality(count, *scores),),
            calibrated=False if recipe == "max" else None,
            notes=("CUDA graphs declined: dynamic shapes",) if recipe == "cache" else (),
        )
        rows.append(row)
    rows += [TENSORRT, *extra_rows]
    again = measured_row("baseline-again", 4.06, 50, count, images("baseline-again", 0), toml="")
    rows.append(again.model_copy(update={"quality": (exact_quality(count),)}))
    results = with_speedups(workload(size, captions), ENVIRONMENT, rows)
    directory.mkdir(parents=True, exist_ok=True)
    write_results(directory / "results.json", results)
    return results
