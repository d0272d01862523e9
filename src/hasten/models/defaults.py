"""Checks of model names, and the default call arguments of models. Does not import torch.

A model on the hub may have a directory in the hub's local cache. A model directory may contain
`hasten.json` alongside `model_index.json`:

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
SECONDS = 3.0  # timeout for requests to the hub


class ModelDefaults(BaseModel):
    """Default arguments of a model's calls.

    Attributes:
        width: Image width in pixels, a multiple of 16.
        height: Image height in pixels, a multiple of 16.
        steps: The number of inference steps.
        guidance: The distilled guidance scale.
        max_sequence_length: The maximum number of T5 tokens.
        prompts: The bundled prompt set for benchmarks and calibration.
    """

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
    """Check a model by its name. The existence of a hub id is not checked until it is loaded.

    Raises:
        ModelError: The name is a file, or a directory without a pipeline.
        InputError: The shape is unknown.
    """
    if model.startswith("shape:"):
        shape_named(model.removeprefix("shape:"))
        return
    directory = model_directory(model)
    # os.path returns False for names that are too long for any file.
    if directory is None or os.path.isfile(directory / "model_index.json"):
        return
    if model == "tiny":
        raise ModelError(
            f"the bundled model is missing from this installation ({directory})",
            "install hasten again, or use another --model",
        )
    if os.path.isfile(directory):
        raise _single_file(directory)
    if not os.path.isdir(directory):
        raise ModelError(
            f"{model}: no such model directory",
            "check the path; a hub id is written owner/name, and the bundled model is called tiny",
        )
    raise ModelError(
        f"{directory}: no model_index.json, so it is not a Diffusers pipeline",
        "use the directory that `pipe.save_pretrained(...)` wrote",
    )


def _single_file(path: Path) -> ModelError:
    """The error for a file, with instructions to load its weights into a pipeline."""
    load = f"transformer = FluxTransformer2DModel.from_single_file({str(path)!r}"
    pipe = 'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=transformer)'
    match path.suffix.lower():
        case ".safetensors" | ".sft":
            kind = "a file of weights"
            fix = f"for FLUX.1-dev, in Python: {load}); {pipe}.save_pretrained(FOLDER); then "
            fix += "--model FOLDER"
        case ".gguf":
            kind = "a file of GGUF weights"
            config = "quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)"
            fix = f"for FLUX.1-dev, in Python: {load}, {config}); "
            fix += f"hasten.optimize({pipe}, RECIPE)"
        case _:
            kind = "a file"
            fix = "use the directory that `pipe.save_pretrained(...)` wrote"
    return ModelError(f"{path}: {kind}, not the directory of a pipeline", fix)


def _looks_like_path(model: str) -> bool:
    """Whether a name is a path: it starts like one, or does not have the form `owner/name`."""
    return model.startswith(("/", "./", "../", "~")) or model.count("/") != 1


def defaults_for(model: str) -> ModelDefaults:
    """The defaults of a model; those of FLUX.1-dev at 512x512 if it has no `hasten.json`.

    Raises:
        ModelError: `hasten.json` is not valid.
    """
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
    """The cached directory from which `DiffusionPipeline.from_pretrained` would load a hub id.

    If the hub cannot be reached, returns an error or does not respond within three seconds, the
    cached snapshot is used.

    Returns:
        The directory; None if the model would be downloaded because there is no snapshot of its
        main branch or the hub has a newer commit.
    """
    folder = kept_snapshot(model)
    return folder if folder is not None and _commit(model) in (folder.name, None) else None


def kept_snapshot(model: str) -> Path | None:
    """The cached directory of a hub id's main branch; None if there is none. Uses no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(model, "model_index.json")
    except HFValidationError:  # not a valid name for the hub
        return None
    return Path(index).parent if isinstance(index, str) else None


def _commit(model: str) -> str | None:
    """The commit of the main branch on the hub; None if the request fails."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(model, timeout=SECONDS).sha
    except Exception:  # of any network library; loading then uses the snapshot, too
        return None
