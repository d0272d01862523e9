"""What can be said of a model by its name alone, and what it is called with by default. No torch.

A model directory may carry `hasten.json` beside `model_index.json`:

    {"width": 128, "height": 128, "steps": 50, "guidance": 3.5, "max_sequence_length": 32}
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hasten.errors import ModelError
from hasten.models.architecture import shape_named
from hasten.user_files import expand_user

__all__ = ["TINY_DIR", "ModelDefaults", "check_model", "defaults_for", "model_directory"]

TINY_DIR = Path(__file__).parent.parent / "assets" / "tiny_flux"


class ModelDefaults(BaseModel):
    """Call defaults: pixels, steps, distilled guidance scale, T5 tokens, bundled prompt set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: Annotated[int, Field(ge=16, le=8192, multiple_of=16)] = 512
    height: Annotated[int, Field(ge=16, le=8192, multiple_of=16)] = 512
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance: Annotated[float, Field(ge=0, le=100)] = 3.5
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = 512
    prompts: Literal["general", "tiny"] = "general"


def model_directory(model: str) -> Path | None:
    """The local directory behind a model name; None for a hub id or a `shape:` model."""
    if model == "tiny":
        return TINY_DIR
    if model.startswith("shape:"):
        return None
    path = expand_user(model)
    return path if os.path.lexists(path) or _looks_like_path(model) else None


def check_model(model: str) -> None:
    """Raise ModelError for a directory that holds no pipeline, InputError for an unknown shape.

    Whether a hub id exists is not known before it is loaded.
    """
    if model.startswith("shape:"):
        shape_named(model.removeprefix("shape:"))
        return
    directory = model_directory(model)
    if directory is None or (directory / "model_index.json").is_file():
        return
    if model == "tiny":
        raise ModelError(
            f"the bundled model is not in this installation ({directory})",
            "install hasten again, or give another --model",
        )
    if not directory.is_dir():
        raise ModelError(
            f"{model}: no such model directory",
            "check the path; a hub id is written owner/name, the bundled model is called tiny",
        )
    raise ModelError(
        f"{directory}: no model_index.json, so it is not a Diffusers pipeline",
        "give the directory that `pipe.save_pretrained(...)` wrote",
    )


def _looks_like_path(model: str) -> bool:
    """A hub id is `owner/name`; anything that starts like a path or nests deeper is a path."""
    return model.startswith(("/", "./", "../", "~")) or model.count("/") != 1


def defaults_for(model: str) -> ModelDefaults:
    """Defaults of a model by name; FLUX.1-dev's at 512x512 where it has no `hasten.json`."""
    directory = model_directory(model)
    path = directory / "hasten.json" if directory else None
    if path is None or not path.is_file():
        return ModelDefaults()
    try:
        return ModelDefaults.model_validate(json.loads(path.read_text("utf-8")))
    except (ValidationError, ValueError) as error:
        first = " ".join(str(error).split())
        raise ModelError(f"{path}: {first}", "correct the file or delete it") from None
