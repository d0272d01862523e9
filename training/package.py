"""Write the pipeline directory that ships, check it by loading it, and store the teacher.

Weights are bf16 safetensors; the text encoders' configs say float32, so that a plain
`FluxPipeline.from_pretrained(directory)` gives four modules of one type.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from training.card import model_card, notice
from training.data import Pack
from training.distill import load_student
from training.evaluate import build_pipeline, generate
from training.flow import load_teacher
from training.models import SIZE, parameter_count
from training.prompts import tiny_prompts
from training.run import Run
from training.text import TEXT_TOKENS, save_tokenizers

__all__ = ["BUDGET_MIB", "package"]

BUDGET_MIB = 26.0


def hasten_defaults(guidance: float, steps: int) -> dict[str, Any]:
    """`hasten.json`: the default arguments of the pipeline call."""
    return {
        "width": SIZE,
        "height": SIZE,
        "steps": steps,
        "guidance": guidance,
        "max_sequence_length": TEXT_TOKENS,
        "prompts": "tiny",
    }


def write_pipeline(pipe: FluxPipeline, pack: Pack, folder: Path) -> None:
    """The Diffusers layout, in bf16, readable by Transformers 4 and 5."""
    modules = {
        name: getattr(pipe, name)
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    for name, module in modules.items():
        module.to(torch.bfloat16).save_pretrained(folder / name, safe_serialization=True)
        module.to(torch.float32)
    name_as_published(folder / "text_encoder" / "model.safetensors")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    save_tokenizers(pack.unigram, pack.bpe, folder)
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    # Named by the classes that both major versions of Transformers have.
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.38.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def name_as_published(path: Path) -> None:
    """Give CLIP's tensors the `text_model.` names that every Transformers version reads."""
    tensors = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def directory_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def check(run: Run, pipe: FluxPipeline, folder: Path, defaults: dict[str, Any]) -> float:
    """Load the directory as a user does and compare its images; returns the largest error."""
    loaded = FluxPipeline.from_pretrained(folder, use_safetensors=True)
    loaded.set_progress_bar_config(disable=True)
    loaded.to(run.device)
    types = {p.dtype for name in modules_of(loaded) for p in getattr(loaded, name).parameters()}
    if types != {torch.float32}:
        raise ValueError(f"{folder} loads as {types}, not as float32 alone")
    settings = {
        "num_inference_steps": defaults["steps"],
        "guidance_scale": defaults["guidance"],
    }
    prompts = tiny_prompts()[:8]
    before = generate(pipe, prompts, **settings)
    after = generate(loaded, prompts, **settings)
    error = float((before - after).abs().max())
    if not error < 0.05:
        raise ValueError(f"{folder} draws other pictures than the pipeline did: {error}")
    return error


def modules_of(pipe: FluxPipeline) -> list[str]:
    return [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]


def package(run: Run, pack: Pack) -> None:
    evaluation = json.loads(run.path("evaluation.json").read_text(encoding="utf-8"))
    folder, teacher_folder = run.path("tiny_flux"), run.path("teacher")
    for old in (folder, teacher_folder):
        shutil.rmtree(old, ignore_errors=True)
    pipe = build_pipeline(run, pack, load_student(run))
    write_pipeline(pipe, pack, folder)
    defaults = hasten_defaults(evaluation["guidance"], evaluation["steps"])
    (folder / "hasten.json").write_text(json.dumps(defaults, indent=2) + "\n")
    counts = {name: parameter_count(getattr(pipe, name)) for name in modules_of(pipe)}
    (folder / "README.md").write_text(model_card(evaluation, counts, pack.things))
    (folder / "NOTICE").write_text(notice())
    teacher = load_teacher(run, pack).transformer.to(torch.bfloat16)
    teacher.save_pretrained(teacher_folder / "transformer", safe_serialization=True)
    size = directory_mib(folder)
    if size > BUDGET_MIB:
        raise ValueError(f"{folder} takes {size:.2f} MiB, more than {BUDGET_MIB}")
    error = check(run, pipe, folder, defaults)
    run.finish("package", mib=size, load_error=error, parameters=sum(counts.values()))
