"""Arguments of a pipeline call: options override a recipe, which overrides the model's defaults.

This module does not import torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hasten.errors import Faults
from hasten.machine import check_dtype
from hasten.models.defaults import ModelDefaults, check_model, defaults_for
from hasten.recipe import Sampling, parse_size

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class CallOptions:
    """Options of a call as the user gave them; None means the model's default.

    Attributes:
        model: Name or path of a model.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        steps: Number of inference steps, from 1 to 1000.
        size: WIDTHxHEIGHT in pixels, multiples of 16.
        seed: Seed of the (first) image's noise.
        guidance: Guidance scale, from 0 to 100.
        max_sequence_length: T5 tokens, from 1 to 512.
    """

    model: str = "tiny"
    device: str = "auto"
    dtype: str = "auto"
    steps: int | None = None
    size: str | None = None
    seed: int = 0
    guidance: float | None = None
    max_sequence_length: int | None = None


@dataclass(frozen=True)
class Settings:
    """Resolved settings: size in pixels, steps, distilled guidance scale and T5 tokens."""

    width: int
    height: int
    steps: int
    guidance: float | None
    max_sequence_length: int

    @classmethod
    def of_model(cls, defaults: ModelDefaults) -> Settings:
        return cls(**defaults.model_dump(exclude={"prompts"}))

    @staticmethod
    def for_call(pipe: Any, sampling: Sampling | None) -> dict[str, Any]:
        """Default arguments of a pipeline call, by the names of the pipeline's parameters.

        A recipe's `[sampling]` overrides the model's `hasten.json`, if it has one. Arguments that
        neither sets are left to the pipeline.
        """
        folder = pipe.config.get("_name_or_path")
        settings: dict[str, Any] = {}
        if folder and (Path(folder) / "hasten.json").is_file():
            settings = asdict(Settings.of_model(defaults_for(str(Path(folder).absolute()))))
        return _call_names(settings | _set_by(sampling))

    def under(self, sampling: Sampling | None) -> Settings:
        """These settings, overridden by those that a recipe's `[sampling]` sets."""
        return replace(self, **_set_by(sampling))

    def call_arguments(self) -> dict[str, Any]:
        """The settings as keyword arguments of a Diffusers pipeline."""
        return _call_names(asdict(self))


CALL_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}


def _call_names(settings: dict[str, Any]) -> dict[str, Any]:
    return {CALL_NAMES.get(name, name): value for name, value in settings.items()}


def _set_by(sampling: Sampling | None) -> dict[str, Any]:
    """The values that a recipe's `[sampling]` sets, by the names of `Settings`."""
    if sampling is None:
        return {}
    changes = sampling.model_dump(exclude_none=True, exclude={"size"})
    if sampling.size is not None:
        changes["width"], changes["height"] = parse_size(sampling.size)
    return changes


def model_defaults(model: str, faults: Faults) -> ModelDefaults:
    """The model's defaults; those of FLUX.1-dev if the model is not usable, which adds a fault."""
    with faults.gather():
        check_model(model)
        return defaults_for(model)
    return ModelDefaults()


def chosen_settings(options: CallOptions, defaults: Settings, faults: Faults) -> Settings:
    """`defaults` overridden by the options.

    Invalid options are added to `faults` and replaced by the default, so that the other options
    can still be checked.
    """
    width, height = defaults.width, defaults.height
    if options.size is not None:
        with faults.gather():
            width, height = parse_size(options.size)
    with faults.gather():
        check_dtype(options.dtype)
    tokens = defaults.max_sequence_length
    return Settings(
        width,
        height,
        whole_number("steps", options.steps, defaults.steps, (1, 1000), faults),
        _guidance(options.guidance, defaults.guidance, faults),
        whole_number("max_sequence_length", options.max_sequence_length, tokens, (1, 512), faults),
    )


def whole_number(
    name: str, value: int | None, default: int, bounds: tuple[int, int], faults: Faults
) -> int:
    """The value; the default if it is None or outside `bounds`, which also adds a fault."""
    if value is None:
        return default
    low, high = bounds
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        faults.add(
            f"{name} = {value!r} is not a whole number from {low} to {high}",
            f"give {name} a whole number from {low} to {high}",
        )
        return default
    return value


def _guidance(value: float | None, default: float | None, faults: Faults) -> float | None:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        faults.add(
            f"guidance = {value!r} is not a number from 0 to 100",
            "give guidance a number from 0 to 100; 3.5 suits FLUX.1-dev",
        )
        return default
    return float(value)
