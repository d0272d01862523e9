"""Evaluate the trained model with the pipeline as it ships: `evaluation.json` and image grids.

Generated images are classified by the classifier, whose accuracy on real images is known. Against
shuffled prompts, the accuracy of the same images must fall to chance level.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image, ImageDraw
from torch import Tensor

from training.autoencoder import reconstruction, unseen_composites
from training.classifier import Classifier, accuracy, load_classifier, real_accuracy
from training.data import Pack
from training.distill import load_student
from training.flow import load_teacher
from training.models import SHIFT, SIZE, scheduler
from training.prompts import Triple, evaluation_triples, prompt_text, tiny_prompts
from training.run import Run
from training.shrink import load_shipped
from training.text import TEXT_TOKENS, clip_tokenizer, t5_tokenizer
from training.vocabulary import COLOURS, STYLES, things

__all__ = ["build_pipeline", "evaluate", "generate"]

STEPS = 50
GUIDANCES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.5)
SHIFTS = (1.0, 2.0, 3.0)
TRUE_CFG = (1.0, 2.0, 3.5)


def build_pipeline(run: Run, pack: Pack, transformer: FluxTransformer2DModel) -> FluxPipeline:
    """The pipeline in memory, every weight rounded to bf16 and back, as its files will hold it."""
    teacher, vae = load_teacher(run, pack), load_shipped(run)
    factors = run.finished("latents")
    if factors is None:
        raise FileNotFoundError(f"{run.folder} has no latents: run that phase first")
    vae.register_to_config(scaling_factor=factors["scaling"], shift_factor=factors["shift"])
    modules = (transformer, vae, teacher.t5, teacher.clip)
    for module in modules:
        module.to(torch.bfloat16).to(torch.float32).eval().requires_grad_(False)
    pipe = FluxPipeline(
        scheduler=scheduler(),
        vae=vae,
        text_encoder=teacher.clip,
        tokenizer=clip_tokenizer(pack.bpe),
        text_encoder_2=teacher.t5,
        tokenizer_2=t5_tokenizer(pack.unigram),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(run.device)


@torch.inference_mode()
def generate(pipe: FluxPipeline, prompts: list[str], **settings: Any) -> Tensor:
    """N×3×128×128 in [0, 1], float32; picture i starts from noise that only i decides."""
    device = pipe.device
    parts = []
    for first in range(0, len(prompts), 384):
        part = prompts[first : first + 384]
        seeds = [torch.Generator("cpu").manual_seed(first + i) for i in range(len(part))]
        if settings.get("true_cfg_scale", 1.0) > 1.0:
            settings["negative_prompt"] = [""] * len(part)
        images = pipe(
            part,
            generator=seeds,
            height=SIZE,
            width=SIZE,
            max_sequence_length=TEXT_TOKENS,
            output_type="pt",
            **settings,
        ).images
        parts.append(images.to(device).float().clamp(0, 1))
    return torch.cat(parts)


def wanted_rows(triples: list[Triple], device: torch.device) -> Tensor:
    """N×3 class indices of the triples."""
    labels = [thing.label for thing in things()]
    names = list(COLOURS)
    return torch.tensor(
        [(labels.index(t.label), STYLES.index(s), names.index(c)) for t, s, c in triples],
        device=device,
    )


def to_image(picture: Tensor) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def grid(pictures: Tensor, labels: list[str], columns: int = 8) -> Image.Image:
    """A contact sheet, with each image above its label on two lines."""
    rows = -(-len(labels) // columns)
    sheet = Image.new("RGB", (columns * SIZE, rows * (SIZE + 24)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = (i % columns) * SIZE, (i // columns) * (SIZE + 24)
        sheet.paste(to_image(picture), (x, y))
        head, _, tail = label.partition(" on ")
        draw.text((x + 2, y + SIZE), head[:24], fill="black")
        draw.text((x + 2, y + SIZE + 11), tail[:24], fill="black")
    return sheet


class Judge:
    """Scores a pipeline's images of the evaluation prompts."""

    def __init__(self, run: Run, pack: Pack, model: Classifier) -> None:
        vocabulary = things()[: pack.things]
        self.model = model
        self.smoke = run.smoke
        self.seen = evaluation_triples(vocabulary, seen=True)
        self.held_out = evaluation_triples(vocabulary, seen=False)
        self.prompts = [prompt_text(triple) for triple in [*self.seen, *self.held_out]]
        self.wanted = wanted_rows([*self.seen, *self.held_out], run.device)

    def some(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """The values of a sweep: all, or only the first in a smoke test."""
        return values[:1] if self.smoke else values

    def score(self, images: Tensor) -> dict[str, Any]:
        count = len(self.seen)
        half = {
            "seen": accuracy(self.model, images[:count], self.wanted[:count]),
            "held_out": accuracy(self.model, images[count:], self.wanted[count:]),
        }
        every = accuracy(self.model, images, self.wanted)
        return {**every, **half}

    def shuffled(self, images: Tensor) -> dict[str, float]:
        """Scores against other prompts' triples, which are the chance level."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return accuracy(self.model, images, self.wanted[order.to(self.wanted.device)])


def overall(score: dict[str, Any]) -> float:
    return float(score["thing"] + 0.5 * score["style"] + 0.5 * score["background"])


def guidance_sweep(pipe: FluxPipeline, judge: Judge, steps: int) -> dict[float, dict[str, Any]]:
    scores = {}
    for guidance in judge.some(GUIDANCES):
        images = generate(pipe, judge.prompts, num_inference_steps=steps, guidance_scale=guidance)
        scores[guidance] = judge.score(images)
        told = ", ".join(f"{k} {scores[guidance][k]:.3f}" for k in ("thing", "style", "background"))
        print(f"[evaluate] guidance {guidance}: {told}", flush=True)
    return scores


def shift_sweep(
    pipe: FluxPipeline, judge: Judge, steps: int, guidance: float
) -> dict[float, dict[str, Any]]:
    """Scores with other timestep shifts; the shipped one is `SHIFT`."""
    kept, scores = pipe.scheduler, {}
    for shift in judge.some(SHIFTS):
        pipe.scheduler = type(kept).from_config(kept.config, shift=shift)
        images = generate(pipe, judge.prompts, num_inference_steps=steps, guidance_scale=guidance)
        scores[shift] = judge.score(images)
        print(f"[evaluate] shift {shift}: thing {scores[shift]['thing']:.3f}", flush=True)
    pipe.scheduler = kept
    return scores


def teacher_scores(run: Run, pack: Pack, judge: Judge, steps: int) -> dict[float, dict[str, Any]]:
    """Scores of the teacher with true classifier-free guidance, two evaluations per step."""
    pipe = build_pipeline(run, pack, load_teacher(run, pack).transformer)
    scores = {}
    for scale in judge.some(TRUE_CFG):
        images = generate(pipe, judge.prompts, num_inference_steps=steps, true_cfg_scale=scale)
        scores[scale] = judge.score(images)
        print(f"[evaluate] teacher, true CFG {scale}: {scores[scale]['thing']:.3f}", flush=True)
    return scores


def save_grids(run: Run, pipe: FluxPipeline, judge: Judge, images: Tensor, **settings: Any) -> None:
    count, shown = len(judge.seen), 64
    step = max(1, count // shown)
    for name, first, last in (("seen", 0, count), ("held-out", count, len(images))):
        pick = list(range(first, last, step))[:shown]
        labels = [judge.prompts[i] for i in pick]
        grid(images[pick], labels).save(run.path(f"grid-{name}.png"))
    prompts = tiny_prompts()[:64] if not run.smoke else tiny_prompts()[:4]
    grid(generate(pipe, prompts, **settings), prompts).save(run.path("grid-prompts.png"))


def save_reconstructions(run: Run, real: Tensor, decoded: Tensor) -> None:
    pairs = torch.stack([real[:32], decoded[:32]], dim=1).flatten(0, 1)
    labels = ["original", "decoded"] * (len(pairs) // 2)
    grid(pairs, labels).save(run.path("grid-autoencoder.png"))


def evaluate(run: Run, pack: Pack) -> None:
    started = time.monotonic()
    steps = 2 if run.smoke else STEPS
    model = load_classifier(run, pack)
    judge = Judge(run, pack, model)
    pipe = build_pipeline(run, pack, load_student(run))
    sweep = guidance_sweep(pipe, judge, steps)
    best = max(sweep, key=lambda guidance: overall(sweep[guidance]))
    settings = {"num_inference_steps": steps, "guidance_scale": best}
    images = generate(pipe, judge.prompts, **settings)
    save_grids(run, pipe, judge, images, **settings)
    real = unseen_composites(run, pack)
    decoded, autoencoder = reconstruction(pipe.vae, real)
    save_reconstructions(run, real, decoded)
    report = {
        "prompts": len(judge.prompts),
        "held_out_prompts": len(judge.held_out),
        "steps": steps,
        "guidance": best,
        "shift": SHIFT,
        "score": judge.score(images),
        "shuffled_prompts": judge.shuffled(images),
        "chance": {"thing": 1 / pack.things, "style": 0.5, "background": 1 / len(COLOURS)},
        "real_held_out": real_accuracy(run, pack, model),
        "by_guidance": sweep,
        "by_shift": shift_sweep(pipe, judge, steps, best),
        "teacher_by_true_cfg": teacher_scores(run, pack, judge, steps),
        "autoencoder_unseen": {**autoencoder, "pictures": len(real)},
        "phases": {
            phase: run.finished(phase)
            for phase in ("classifier", "autoencoder", "latents", "flow", "distill", "shrink")
        },
    }
    run.path("evaluation.json").write_text(json.dumps(report, indent=2))
    told = {key: report["score"][key] for key in ("thing", "style", "background")}
    seconds = time.monotonic() - started
    run.finish("evaluate", seconds=seconds, guidance=best, psnr=autoencoder["psnr"], **told)
