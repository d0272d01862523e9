"""The cost of 8-bit quantisation on the bundled model: image quality per scheme, error per layer.

    python -m studies.quantization studies/results/quantization/tiny.json

Schemes of the blocks' linears are emulated, so any device gives their quality. Those of the T5
encoder are not emulated; they only store weights in eight bits. Static scales are calibrated on
other prompts than the images'. Images are compared with those of the plain pipeline. Prints
the tables of docs/passes/quantize.md and docs/passes/text.md.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten import Recipe, quality
from hasten.benchmark.environment import detect
from hasten.families import family_of
from hasten.prompts import read_prompts
from hasten.quantization.report import layer_errors
from hasten.recipe import Quantize

PROMPTS = 8
CALIBRATED_ON = 16  # the prompts behind those
GRANULARITIES = {"fp8": ("row", "tensor"), "int8": ("row", "tensor")}
SCHEMES = [
    (scheme + weight, granularity)
    for weight in ("", "-weight")
    for scheme, granularities in GRANULARITIES.items()
    for granularity in granularities
]


def main() -> None:
    pipe = hasten.load_pipeline("tiny", device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    prompts = read_prompts("tiny", limit=PROMPTS)
    plain = _pictures(pipe, {}, prompts)
    rows = [
        _blocks(pipe, {"scheme": scheme, "granularity": scale}, prompts, plain)
        for scheme, scale in SCHEMES
    ]
    rows += [_static(pipe, granularity, prompts, plain) for granularity in GRANULARITIES["fp8"]]
    rows += [
        {"text": scheme, **_distances(pipe, {"text": {"scheme": scheme}}, prompts, plain)}
        for scheme in ("fp8-weight", "int8-weight")
    ]
    result = {
        "schema": 1,
        "prompts": prompts,
        "rows": rows,
        "environment": detect("tiny", "cpu", "float32").environment.model_dump(mode="json"),
    }
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print("\n\n".join([blocks_table(rows), text_table(rows)]))


def blocks_table(rows: list[dict[str, Any]]) -> str:
    """One line per scheme and granularity."""
    return "\n".join(
        f"| `{row['scheme']}`{', static' if row.get('activations') else ''} | {row['granularity']} "
        f"| {row['sqnr_db'][0]:.1f} / {median(row['sqnr_db']):.1f} / {row['sqnr_db'][-1]:.1f} "
        f"| {fmean(row['lpips']):.4f} / {max(row['lpips']):.4f} "
        f"| {fmean(row['psnr']):.1f} / {min(row['psnr']):.1f} |"
        for row in rows
        if "scheme" in row
    )


def text_table(rows: list[dict[str, Any]]) -> str:
    """One line per scheme of the T5 encoder."""
    return "\n".join(
        f"| `{row['text']}` | {fmean(row['lpips']):.4f} | {fmean(row['ssim']):.4f} "
        f"| {fmean(row['psnr']):.1f} dB |"
        for row in rows
        if "text" in row
    )


def _static(pipe: Any, granularity: str, prompts: list[str], plain: Tensor) -> dict[str, Any]:
    """FP8 with scales from the prompts that follow those of the images."""
    others = read_prompts("tiny", limit=PROMPTS + CALIBRATED_ON)[PROMPTS:]
    recipe = Recipe(quantize=Quantize(granularity=granularity))
    found = hasten.calibrate_activations(pipe, others, recipe=recipe, batch=8).quantize
    row = _blocks(pipe, found.model_dump(exclude_none=True), prompts, plain)
    return {**row, "activations": "static", "calibrated_on": others, "amax": dict(found.amax)}


def _blocks(pipe: Any, recipe: dict[str, Any], prompts: list[str], plain: Tensor) -> dict[str, Any]:
    quantize = {**recipe, "emulate": True}
    linears = family_of(pipe).quantizable(pipe.transformer)
    fast = hasten.optimize(pipe, "baseline")
    errors = layer_errors(
        linears, Quantize.model_validate(quantize), lambda: _picture(fast, prompts[0], 0, steps=4)
    )
    fast.restore()
    decibels = sorted(error.sqnr_db for error in errors)
    assert all(math.isfinite(value) for value in decibels)
    return {
        "scheme": recipe["scheme"],
        "granularity": recipe["granularity"],
        "sqnr_db": decibels,
        **_distances(pipe, {"quantize": quantize}, prompts, plain),
    }


def _distances(
    pipe: Any, recipe: dict[str, Any], prompts: list[str], plain: Tensor
) -> dict[str, list[float]]:
    pictures = _pictures(pipe, recipe, prompts)
    return {
        metric: getattr(quality, metric)(pictures, plain).tolist()
        for metric in ("lpips", "ssim", "psnr")
    }


def _pictures(pipe: Any, recipe: dict[str, Any], prompts: list[str]) -> Tensor:
    """PROMPTS×3×128×128 in [0, 1], from a copy of the pipeline with the recipe."""
    fast = hasten.optimize(pipe, Recipe.from_dict(recipe), copy=True)
    return torch.cat([_picture(fast, prompt, seed) for seed, prompt in enumerate(prompts)])


def _picture(fast: Any, prompt: str, seed: int, steps: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    picture: Tensor = fast(
        prompt, num_inference_steps=steps, generator=generator, output_type="pt"
    ).images
    return picture.clamp(0, 1)


if __name__ == "__main__":
    main()
