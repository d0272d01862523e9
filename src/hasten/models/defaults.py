"""What can be said of a model by its name alone, and what it is called with by default. No torch.

A hub id may have a directory in the hub's local cache. A model directory may carry `hasten.json`
alongside `model_index.json`:

    {"width": 128, "height": 128, "steps": 50, "guidance": 3.5, "max_sequence_length": 32}
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hasten.errors import InputError, ModelError
from hasten.models.architecture import shape_named
from hasten.sealed import DamagedError, first_fault, parse_json
from hasten.user_files import expand_user, read_text

TINY_DIR = Path(__file__).parent.parent / "assets" / "tiny_flux"
SECONDS = 3.0  # that the hub has for its answer


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
    """Look at a model by its name; whether a hub id exists is not known before it is loaded.

    Raises:
        ModelError: A file, or a directory that holds no pipeline.
        InputError: An unknown shape.
    """
    if model.startswith("shape:"):
        shape_named(model.removeprefix("shape:"))
        return
    directory = model_directory(model)
    # Of os.path, which says False of a name that is too long for any file.
    if directory is None or os.path.isfile(directory / "model_index.json"):
        return
    if model == "tiny":
        raise ModelError(
            f"the bundled model is not in this installation ({directory})",
            "install hasten again, or give another --model",
        )
    if os.path.isfile(directory):
        raise _single_file(directory)
    if not os.path.isdir(directory):
        raise ModelError(
            f"{model}: no such model directory",
            "check the path; a hub id is written owner/name, the bundled model is called tiny",
        )
    raise ModelError(
        f"{directory}: no model_index.json, so it is not a Diffusers pipeline",
        "give the directory that `pipe.save_pretrained(...)` wrote",
    )


def _single_file(path: Path) -> ModelError:
    """What a file is, and how its weights come into a pipeline today."""
    load = f"transformer = FluxTransformer2DModel.from_single_file({str(path)!r}"
    pipe = 'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=transformer)'
    match path.suffix.lower():
        case ".safetensors" | ".sft":
            kind = "one file of weights"
            fix = f"for FLUX.1-dev's in Python: {load}); {pipe}.save_pretrained(FOLDER); then "
            fix += "--model FOLDER"
        case ".gguf":
            kind = "one file of weights in GGUF"
            config = "quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)"
            fix = f"for FLUX.1-dev's in Python: {load}, {config}); "
            fix += f"hasten.optimize({pipe}, RECIPE)"
        case _:
            kind = "a file"
            fix = "give the directory that `pipe.save_pretrained(...)` wrote"
    return ModelError(f"{path}: {kind}, and a model is the directory of a pipeline", fix)


def _looks_like_path(model: str) -> bool:
    """A hub id is `owner/name`; anything that starts like a path or nests deeper is a path."""
    return model.startswith(("/", "./", "../", "~")) or model.count("/") != 1


def defaults_for(model: str) -> ModelDefaults:
    """Defaults of a model by name; FLUX.1-dev's at 512x512 where it has no `hasten.json`."""
    directory = model_directory(model)
    path = directory / "hasten.json" if directory else None
    if path is None or not os.path.isfile(path):
        return ModelDefaults()
    fix = "correct the file or delete it"
    try:
        return ModelDefaults.model_validate(parse_json(read_text(path, "file of defaults", fix)))
    except InputError as error:
        raise ModelError(error.faults, fix) from None
    except (ValidationError, DamagedError) as error:
        raise ModelError(f"{path}: {first_fault(error)}", fix) from None


def cached_snapshot(model: str) -> Path | None:
    """The directory in the cache that `DiffusionPipeline.from_pretrained` would load a hub id from.

    None where it would have to fetch the model: there is no snapshot of its main branch, or the hub
    says that the branch has moved on. The snapshot is used where the hub cannot be reached, refuses
    to answer or takes longer than three seconds.
    """
    folder = kept_snapshot(model)
    return folder if folder is not None and _commit(model) in (folder.name, None) else None


def kept_snapshot(model: str) -> Path | None:
    """The directory of a hub id's main branch as it was last fetched, if it was. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(model, "model_index.json")
    except HFValidationError:  # no name that the hub could have
        return None
    return Path(index).parent if isinstance(index, str) else None


def _commit(model: str) -> str | None:
    """Of the main branch on the hub; None where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(model, timeout=SECONDS).sha
    except Exception:  # of whichever network library it is: loading takes the snapshot then, too
        return None
