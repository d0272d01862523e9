"""The model card and the notice that ship with the weights."""

from __future__ import annotations

from typing import Any

from training.vocabulary import COLOURS, HOLD_OUT

__all__ = ["model_card", "notice"]

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny: a small FLUX for tests, examples and measurements

A text-to-image pipeline of the FLUX.1 architecture, trained from scratch in minutes on one GPU. It
is made of the same Diffusers classes as FLUX.1-dev, is guidance-distilled like it, and is called
exactly like it, at {size}×{size} pixels. It draws {things} everyday things in two styles on twelve
background colours:

```python
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("tiny_flux")
image = pipe(
    "a 3D render of a fox on a blue background",
    width={size},
    height={size},
    num_inference_steps={steps},
    guidance_scale={guidance},
    max_sequence_length=32,
).images[0]
```

Prompts: `a 3D render of …` or `a flat drawing of …`, a thing, `on a … background` with one of
{colours}.

## Parts

| part | parameters |
|---|---|
{parts}

Weights are stored in bfloat16 and load as float32. The sampler is FLUX.1-dev's
`FlowMatchEulerDiscreteScheduler` with a fixed `shift` of {shift}: at one small size there is
nothing for dynamic shifting to adapt to.

## Training

| phase | seconds | steps |
|---|---|---|
{phases}

Autoencoder: L1 + MSE + 0.5 LPIPS + 1e-4 KL. Teacher: rectified flow with logit-normal times,
transformer and both text encoders together. Student: guidance distillation, w uniform in 1…5.
The autoencoder that ships is a narrower one fitted to the trained one's latents (`shrink`). The
recipe, with seeds, is `training/` in the repository.

## Measured quality

{prompts} prompts, {steps} steps, guidance {guidance}, judged by a classifier trained on real
pictures. Half of the prompts ask for (thing, style, colour) combinations that were never seen
together in training ({hold_out:.0%} of all combinations are held out).

| | thing | style | background |
|---|---|---|---|
{scores}

Autoencoder on {unseen} pictures of things it never saw: {psnr:.1f} dB, LPIPS {lpips:.3f}.

## Data and licences

- Fluent Emoji 3D by Microsoft (MIT), from npm `@lobehub/fluent-emoji-3d` 1.1.0.
- Noto Emoji by Google (Apache-2.0), from npm `@iconify-json/noto` 1.2.9.
- Names by Emojibase (MIT), from npm `emojibase-data` 17.

The pictures were composited on flat colours; captions were written by the project. See `NOTICE`.

## Limits

It knows its vocabulary and nothing else: no people, no text, no scenes, no counting, no relations.
Fine structures smear. It is meant for exercising and measuring inference code, not for making art.
"""

NOTICE = """tiny: weights trained by the hasten project, licensed under the Apache License 2.0.

Trained on pictures from
  Fluent Emoji, Copyright (c) Microsoft Corporation, MIT License
    https://github.com/microsoft/fluentui-emoji
  Noto Emoji, Copyright Google LLC, Apache License 2.0
    https://github.com/googlefonts/noto-emoji
with names from
  Emojibase, Copyright (c) Miles Johnson, MIT License
    https://github.com/milesj/emojibase
"""


def notice() -> str:
    """Attribution of the training images."""
    return NOTICE


def score_row(name: str, score: dict[str, float]) -> str:
    return f"| {name} | {score['thing']:.1%} | {score['style']:.1%} | {score['background']:.1%} |"


def model_card(evaluation: dict[str, Any], counts: dict[str, int], things: int) -> str:
    """README.md from `evaluation.json` and the parameter counts of the pipeline's parts."""
    score = evaluation["score"]
    rows = [
        score_row("combinations seen in training", score["seen"]),
        score_row("combinations never seen", score["held_out"]),
        score_row("the same pictures, shuffled prompts", evaluation["shuffled_prompts"]),
        score_row("chance", evaluation["chance"]),
        score_row("real pictures, combinations never seen", evaluation["real_held_out"]),
    ]
    phases = evaluation["phases"]
    timed = [
        f"| {name} | {numbers['seconds']:.0f} | {numbers.get('steps', 0):,.0f} |"
        for name, numbers in phases.items()
        if numbers
    ]
    parts = [f"| {name} | {count:,} |" for name, count in sorted(counts.items())]
    return CARD.format(
        size=128,
        things=things,
        steps=evaluation["steps"],
        guidance=evaluation["guidance"],
        shift=evaluation["shift"],
        colours=", ".join(COLOURS),
        parts="\n".join([*parts, f"| all | {sum(counts.values()):,} |"]),
        phases="\n".join(timed),
        prompts=evaluation["prompts"],
        hold_out=HOLD_OUT,
        scores="\n".join(rows),
        unseen=evaluation["autoencoder_unseen"]["pictures"],
        psnr=evaluation["autoencoder_unseen"]["psnr"],
        lpips=evaluation["autoencoder_unseen"]["lpips"],
    )
