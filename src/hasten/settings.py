"""What a pipeline is called with: options over a recipe over the model's defaults. No torch."""

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
    """What was asked for, as it was asked; None means the model's own default."""

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
    """Pixels, steps, distilled guidance scale, T5 tokens."""

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
        """Arguments of a pipeline's call where the caller passes none.

        Those of the model's `hasten.json`, where it has one, under those of a recipe's
        `[sampling]`; what neither sets is left to the pipeline.
        """
        folder = pipe.config.get("_name_or_path")
        settings: dict[str, Any] = {}
        if folder and (Path(folder) / "hasten.json").is_file():
            settings = asdict(Settings.of_model(defaults_for(str(Path(folder).absolute()))))
        return _call_names(settings | _set_by(sampling))

    def under(self, sampling: Sampling | None) -> Settings:
        """These, overridden by what a recipe's `[sampling]` sets."""
        return replace(self, **_set_by(sampling))

    def call_arguments(self) -> dict[str, Any]:
        """The same under the names a Diffusers pipeline has for them."""
        return _call_names(asdict(self))


CALL_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}


def _call_names(settings: dict[str, Any]) -> dict[str, Any]:
    return {CALL_NAMES.get(name, name): value for name, value in settings.items()}


def _set_by(sampling: Sampling | None) -> dict[str, Any]:
    """What a recipe's `[sampling]` sets, by the names of `Settings`."""
    if sampling is None:
        return {}
    changes = sampling.model_dump(exclude_none=True, exclude={"size"})
    if sampling.size is not None:
        changes["width"], changes["height"] = parse_size(sampling.size)
    return changes


def model_defaults(model: str, faults: Faults) -> ModelDefaults:
    """The model's defaults; FLUX.1-dev's stand in for those of a model there is not."""
    with faults.gather():
        check_model(model)
        return defaults_for(model)
    return ModelDefaults()


def chosen_settings(options: CallOptions, otherwise: Settings, faults: Faults) -> Settings:
    """`otherwise` with what the options set; what is wrong with them goes into `faults`.

    After a fault the value of `otherwise` stands in, so that the rest can still be looked at.
    """
    width, height = otherwise.width, otherwise.height
    if options.size is not None:
        with faults.gather():
            width, height = parse_size(options.size)
    with faults.gather():
        check_dtype(options.dtype)
    tokens = otherwise.max_sequence_length
    return Settings(
        width,
        height,
        whole_number("steps", options.steps, otherwise.steps, (1, 1000), faults),
        _guidance(options.guidance, otherwise.guidance, faults),
        whole_number("max_sequence_length", options.max_sequence_length, tokens, (1, 512), faults),
    )


def whole_number(
    name: str, value: int | None, default: int, bounds: tuple[int, int], faults: Faults
) -> int:
    """The value, or the default where it is None or, after noting the fault, out of bounds."""
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
