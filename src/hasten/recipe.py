"""The declarative recipe: what to do to a pipeline. TOML in, TOML out, no torch.

A recipe is a frozen tree of pydantic models. Every section is optional; an absent section means
that its pass does not run. `Recipe()` changes nothing at all and is the preset `baseline`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from hasten.errors import InputError, RecipeError, one_line
from hasten.presets import GUIDES
from hasten.user_files import control_character, read_text

Steps = Annotated[int, Field(ge=1, le=1000)]
Predictor = Literal["reuse", "linear", "damped"]
StepIndex = Annotated[int, Field(strict=True, ge=0)]
Sigma = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Largest = Annotated[float, Field(gt=0, le=3e38)]  # what float32 holds
# Learned weights add up to about 1, and none is above 10. At 1e3, bfloat16 rounding errors are as
# large as the image itself; beyond float32's range the image is black.
Weight = Annotated[float, Field(ge=-1e3, le=1e3, allow_inf_nan=False)]
Weights = Annotated[tuple[Weight, ...], Field(strict=False, min_length=1, max_length=4)]


class Section(BaseModel):
    """Base class of a recipe's tables: immutable, no unknown keys, no coerced values."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _is_a_size(text: str) -> str:
    try:
        parse_size(text)
    except InputError as error:
        raise ValueError(error.faults[0]) from None
    return text


Size = Annotated[str, AfterValidator(_is_a_size)]


class Sampling(Section):
    """Defaults of the pipeline call; arguments of the call take precedence."""

    steps: Steps | None = Field(default=None, description="number of inference steps")
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        default=None, description="guidance scale (the distilled one: not true CFG)"
    )
    size: Size | None = Field(default=None, description='"WIDTHxHEIGHT" in pixels, multiples of 16')
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] | None = Field(
        default=None, description="T5 tokens"
    )


class IntervalCache(Section):
    """Compute all steps before `start_step`, then every `interval`-th, then all from `end_step`.

    Pruna's `cache_interval = k` reuses an output *for* k steps, which is `interval = k + 1` here.
    """

    kind: Literal["interval"] = Field(default="interval", description="this kind; may be left out")
    start_step: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=2, description="steps at the start of a run that are all computed"
    )
    interval: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=3, description="after those, every n-th step is computed"
    )
    end_step: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        default=None, description="from this step on, all steps are computed; absent: no such step"
    )
    predictor: Predictor = Field(
        default="reuse", description="how the output of a skipped step is predicted"
    )

    @model_validator(mode="after")
    def _end_after_start(self) -> Self:
        if self.end_step is not None and self.end_step < self.start_step:
            raise ValueError(f"end_step = {self.end_step} is before start_step = {self.start_step}")
        return self


class ScheduleCache(Section):
    """A static plan of which steps to compute, usually learned by `hasten calibrate`.

    `sigmas` are the noise levels of the plan. For a run with other noise levels the plan is
    resampled in sigma. `weights` has one entry per computed step: it combines the newest outputs
    (newest first) into the velocity that is used until the next computed step. Without `weights`,
    `predictor` fills the skipped steps. `fingerprint` identifies the model of the plan.
    """

    kind: Literal["schedule"] = Field(default="schedule", description="this kind")
    steps: Annotated[int, Field(ge=1, le=1000)] = Field(
        description="number of inference steps that the plan is for"
    )
    compute: Annotated[tuple[StepIndex, ...], Field(strict=False, min_length=1)] = Field(
        description="indices of the steps to compute: rising, the first one 0"
    )
    predictor: Predictor = Field(
        default="linear", description="how the output of a skipped step is predicted"
    )
    weights: Annotated[tuple[Weights, ...], Field(strict=False)] | None = Field(
        default=None,
        description="per computed step, the weights of the newest outputs (newest first) whose sum "
        "replaces the predictor",
    )
    sigmas: Annotated[tuple[Sigma, ...], Field(strict=False)] | None = Field(
        default=None, description="noise level of each step when the plan was learned: falling"
    )
    fingerprint: str | None = Field(
        default=None, description="fingerprint of the model that it was learned on"
    )
    prompts: Annotated[tuple[str, ...], Field(strict=False)] | None = Field(
        default=None, description="hashes of the prompts that it was learned and checked on"
    )
    expected_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="relative error of the final latents on held-back prompts"
    )
    calibrated: bool = Field(
        default=True, description="false: it was not learned on this model, which results report"
    )

    @model_validator(mode="after")
    def _is_a_plan(self) -> Self:
        if self.compute[0] != 0:
            raise ValueError("compute must begin with step 0, which cannot be predicted")
        if any(b <= a for a, b in pairwise(self.compute)) or self.compute[-1] >= self.steps:
            raise ValueError(f"compute must increase strictly and stay below steps = {self.steps}")
        for name, given, length in (
            ("weights", self.weights, len(self.compute)),
            ("sigmas", self.sigmas, self.steps),
        ):
            if given is not None and len(given) != length:
                raise ValueError(f"{name} must have {length} entries, but has {len(given)}")
        if self.sigmas is not None and any(b >= a for a, b in pairwise(self.sigmas)):
            raise ValueError("sigmas must be strictly decreasing")
        return self


class BudgetCache(Section):
    """Compute `budget` steps, by a schedule learned for this model or else a generic one."""

    kind: Literal["budget"] = Field(default="budget", description="this kind; may be left out")
    budget: Annotated[int, Field(ge=1, le=1000)] = Field(description="number of steps to compute")


class ResidualCache(Section):
    """Run the first blocks on every step, and the others only if the residual changed.

    The residual is what blocks add to the image tokens. It is compared with that of the last
    computed step. If it changed by less than `threshold`, the other blocks are skipped and their
    last residual is used. The number of computed steps depends on the image, and each decision
    waits for the device.
    """

    kind: Literal["residual"] = Field(default="residual", description="this kind")
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=0.1, description="relative L1 change below which a step is skipped"
    )
    warmup_steps: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=4, description="first steps of a run, always computed"
    )
    max_consecutive: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=4, description="steps skipped in a row at most; 1000 is no limit"
    )
    first_blocks: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=1, description="blocks that run on every step"
    )
    predictor: Predictor = Field(
        default="reuse", description="what stands in for the residual of the other blocks"
    )


PlannedCache = IntervalCache | ScheduleCache | BudgetCache  # known in full before a run starts


def _cache_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        kind = value.get("kind", "budget" if "budget" in value else "interval")
        return kind if isinstance(kind, str) else str(kind)
    return getattr(value, "kind", None)


Cache = Annotated[
    Annotated[IntervalCache, Tag("interval")]
    | Annotated[ScheduleCache, Tag("schedule")]
    | Annotated[BudgetCache, Tag("budget")]
    | Annotated[ResidualCache, Tag("residual")],
    Discriminator(_cache_kind),
]


class Fuse(Section):
    """Work done once per run instead of once per step, and fused kernels.

    `conditioning`: the AdaLN modulations of all steps, the rotary embeddings and the text
    embeddings are computed before the first step. `kernels`: the blocks use hasten's fused
    kernels. "auto" uses them where possible and otherwise reports why not.
    """

    conditioning: bool = Field(
        default=True, description="compute the modulations of all steps before the first step"
    )
    kernels: Literal["auto", "on", "off"] = Field(
        default="auto",
        description='fused kernels of the blocks; "auto": where possible; "on": else an error',
    )


class Quantize(Section):
    """Linears of the repeated blocks in eight bits; embedders, modulations and outputs stay.

    `fp8`, `int8`: weights and activations; `fp8-weight`, `int8-weight`: weights only. `emulate`
    rounds as the scheme does and multiplies in the pipeline's dtype. This gives the scheme's
    quality on any device, without its speed.

    `activations`: scales computed per call ("dynamic"), or one fixed scale per linear ("static",
    `fp8` only). Static scales come from `amax`, the largest absolute input of each linear, which
    `hasten calibrate-scales` measures on the model with this `fingerprint`. Larger inputs saturate.
    With static scales, `granularity` applies to the weights only.
    """

    scheme: Literal["fp8", "int8", "fp8-weight", "int8-weight"] = Field(
        default="fp8", description="format of weights and activations, or of weights only"
    )
    granularity: Literal["row", "tensor"] = Field(
        default="row", description="one scale per row (token or output channel) or per tensor"
    )
    skip: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="linears to leave alone, as patterns: transformer_blocks.0.*"
    )
    emulate: bool = Field(
        default=False, description="round as the scheme does, multiply in the pipeline's dtype"
    )
    activations: Literal["dynamic", "static"] = Field(
        default="dynamic", description="scales computed per call, or calibrated ones"
    )
    amax: Mapping[str, Largest] | None = Field(
        default=None, description="largest absolute input of each linear, by the linear's name"
    )
    fingerprint: str | None = Field(
        default=None, description="fingerprint of the model that amax was measured on"
    )

    @model_validator(mode="after")
    def _amax_is_for_static_scales(self) -> Self:
        if self.activations == "dynamic":
            if self.amax is not None or self.fingerprint is not None:
                raise ValueError(
                    'amax and fingerprint belong to activations = "static": set it, or remove them'
                )
            return self
        if self.scheme != "fp8":
            raise ValueError(
                f'activations = "static" is for scheme = "fp8", not "{self.scheme}": '
                'set scheme = "fp8", or activations = "dynamic"'
            )
        if not self.amax:
            raise ValueError(
                'activations = "static" needs [quantize.amax]: measure it with '
                "`hasten calibrate-scales`, which writes the recipe"
            )
        return self


class Attention(Section):
    """Which attention kernel to use; "auto" times the available ones once per shape."""

    backend: Literal["auto", "native", "cudnn", "flash", "efficient", "math"] = Field(
        default="auto", description='attention kernel; "native" is what torch chooses'
    )


class Compile(Section):
    """torch.compile of the repeated blocks (one compilation per block class) or the whole step.

    `cuda_graphs`: record the kernels of a step once per input shape and replay them in one launch.
    Mode "none" does this without torch.compile.
    """

    mode: Literal["blocks", "full", "none"] = Field(
        default="blocks", description="what torch.compile compiles"
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        default="off",
        description='CUDA graphs of a step; "auto": where possible; "on": else an error',
    )
    dynamic: bool | None = Field(
        default=None,
        description="true: symbolic shapes from the start; absent: after a shape has changed",
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.mode == "none" and self.cuda_graphs == "off":
            raise ValueError('mode = "none" without cuda_graphs does nothing: leave [compile] out')
        return self


class Text(Section):
    """Text encoders: a cache of prompt embeddings, and 8-bit weights."""

    cache_mb: Annotated[int, Field(ge=0, le=65536)] = Field(
        default=0, description="size of the cache of prompt embeddings, in MiB; 0: no cache"
    )
    scheme: Literal["fp8-weight", "int8-weight"] | None = Field(
        default=None, description="how the T5 encoder's linears are stored"
    )


class Decoder(Section):
    """The VAE: memory layout, compilation and tiling of its decoder."""

    compile: bool = Field(default=False, description="compile the decoder with torch.compile")
    channels_last: bool = Field(
        default=False, description="store the convolutions' weights in channels-last layout"
    )
    tiling: Literal["auto", "on", "off"] = Field(
        default="off", description='"auto" tiles images larger than 2048x2048 pixels'
    )


class Offload(Section):
    """Which weights stay in host memory until they are needed.

    `model` keeps one component at a time on the accelerator. `modulation` keeps the weights that
    produce the conditioning table in host memory and copies them over layer by layer.
    """

    kind: Literal["none", "model", "modulation"] = Field(
        default="none", description="which weights are kept in host memory until they are needed"
    )


class Engine(Section):
    """The transformer's blocks as an exported graph that an engine runs instead of torch.

    `onnxruntime` runs the TensorRT engine's graph on a CPU, to measure its quality, not its speed.
    """

    kind: Literal["tensorrt", "onnxruntime"] = Field(
        default="tensorrt", description="what runs the graph"
    )
    precision: Literal["bf16", "fp16", "fp8"] = Field(
        default="fp8", description="number format of the graph's linears"
    )
    calibration: Literal["max", "smoothquant"] = Field(
        default="max", description="how fp8 determines the scales of the inputs of its linears"
    )
    max_size: Size | None = Field(
        default=None, description="WIDTHxHEIGHT of the largest image; absent: 2048x2048"
    )
    path: str | None = Field(
        default=None,
        description="folder that `hasten export tensorrt` wrote, relative to the recipe file; "
        "absent: exported once, then cached",
    )
    verify: bool = Field(default=True, description="compare the exported graph with torch")
    release: bool = Field(default=False, description="free the torch weights of the blocks")

    @model_validator(mode="after")
    def _is_exported_or_loaded(self) -> Self:
        export_only = ("max_size", "calibration", "verify")
        fields = type(self).model_fields
        given = [name for name in export_only if getattr(self, name) != fields[name].default]
        if self.path is not None and given:
            raise ValueError(
                f"{', '.join(given)}: applies to exporting an engine, and path names an exported "
                "one: remove one or the other"
            )
        return self


class Recipe(Section):
    """All passes of one optimisation. Order: quantize, fuse, compile, cache, text to offload.

    `name` is used in results and file names. A recipe that is read from a file takes the file's
    name, not the name in its text, so that copies of one recipe can be distinguished.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        default="custom", description="letters, digits, dots, dashes and underscores; at most 64"
    )
    description: str = Field(default="", description="one line for `hasten recipes list`")
    sampling: Sampling | None = None
    fuse: Fuse | None = None
    quantize: Quantize | None = None
    attention: Attention | None = None
    cache: Cache | None = None
    compile: Compile | None = None
    engine: Engine | None = None
    text: Text | None = None
    decoder: Decoder | None = None
    offload: Offload | None = None

    @classmethod
    def from_toml(cls, text: str, *, source: str = "recipe") -> Recipe:
        """Parse TOML text.

        Args:
            text: The recipe.
            source: Where the text comes from; error messages begin with it.

        Raises:
            RecipeError: The recipe is not valid; every fault is listed.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            reason = f"not valid TOML: {error}"
        except ValueError:  # Python's limit; TOML's are 64 bits
            reason = "a number has thousands of digits"
        except RecursionError:
            reason = "nested too deeply"
        else:
            return cls.from_dict(data, source=source)
        raise RecipeError(
            f"{source}: {reason}", "`hasten recipes show cache` prints a valid recipe"
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, source: str = "recipe") -> Recipe:
        """Validate plain data, as `from_toml` does with parsed text.

        Raises:
            RecipeError: The recipe is not valid; every fault is listed.
        """
        if invalid := list(_invalid_values(data)):
            raise RecipeError(
                _first(f"{source}: {fault}" for fault in invalid), "correct these values"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            faults = _first(f"{source}: {_fault(detail)}" for detail in error.errors())
            raise RecipeError(faults, _recipe_fix(error)) from None

    def to_toml(self) -> str:
        """The recipe as TOML text, without unset values. `from_toml` returns an equal recipe."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema (draft 2020-12) of a recipe file, for editors and other tools."""
        return cls.model_json_schema()

    @property
    def changes_nothing(self) -> bool:
        """Whether the recipe has no section, so that the pipeline stays unmodified."""
        return not self.model_dump(exclude_none=True, exclude={"name", "description"})

    @property
    def compiles(self) -> bool:
        """Whether torch.compile takes part in the transformer's work."""
        return self.compile is not None and self.compile.mode != "none"

    def but(self, **changes: Any) -> Recipe:
        """A validated copy with some sections replaced, e.g. `recipe.but(cache=None)`."""
        return Recipe.model_validate({**dict(self), **changes})


def parse_size(text: str, *, at_most: bool = False) -> tuple[int, int]:
    """Parse a size such as `"512x768"`.

    Args:
        text: WIDTHxHEIGHT in pixels, each a multiple of 16 from 16 to 8192.
        at_most: The size is an upper bound, so the fix rounds up instead of to the closest size.

    Returns:
        Width and height in pixels.

    Raises:
        InputError: The text has another form, or a side is out of range.
    """
    match = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", text.strip())
    if match is None:
        raise InputError(f"size {text!r} is not WIDTHxHEIGHT", "for example: 512x512")
    width, height = int(match[1]), int(match[2])
    faults = [
        f"{side} {value} is not a multiple of 16 between 16 and 8192"
        for side, value in (("width", width), ("height", height))
        if value % 16 or not 16 <= value <= 8192
    ]
    if faults:
        rounded = math.ceil if at_most else round
        closest = "x".join(
            str(min(8192, max(16, rounded(value / 16) * 16))) for value in (width, height)
        )
        raise InputError(faults, f"the closest valid size is {closest}")
    return width, height


def preset_names() -> list[str]:
    """Names of the bundled presets, in the order of `hasten.presets.GUIDES`; `baseline` is last."""
    return list(GUIDES)


def resolve(recipe: str | Path | Recipe) -> Recipe:
    """Turn the name of a preset or the path of a .toml file into a recipe.

    Args:
        recipe: A preset's name, a path, or a Recipe, which is returned as it is.

    Raises:
        InputError: The file cannot be read.
        RecipeError: There is no such preset, or the recipe is not valid.
    """
    if isinstance(recipe, Recipe):
        return recipe
    text = str(recipe)
    if text in preset_names():
        preset = resources.files("hasten.presets").joinpath(f"{text}.toml")
        return Recipe.from_toml(preset.read_text("utf-8"), source=text)
    if isinstance(recipe, Path) or text.endswith(".toml") or "/" in text:
        return read_recipe(Path(text))
    close = difflib.get_close_matches(text[:80], preset_names(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise RecipeError(
        f"no preset is called {one_line(text, 80)!r}",
        f"{hint}presets: {', '.join(preset_names())}; or give the path of a .toml file",
    )


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file, in UTF-8 or UTF-16.

    The recipe is named after the file, without `.toml`. A relative `engine.path` is relative to
    the file's folder.

    Raises:
        InputError: The file cannot be read.
        RecipeError: The recipe is not valid.
    """
    text = read_text(path, "recipe file", "give a preset's name, or the path of a TOML file")
    recipe = Recipe.from_toml(text, source=str(path))
    return _relative_to(path.parent, recipe.but(name=_name_of(path.stem)))


def _name_of(stem: str) -> str:
    """A valid recipe name from a file's stem: ASCII, at most 64 characters."""
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")
    if name and len(name) <= 64:
        return name
    digest = hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[:55] or 'recipe'}-{digest}"


def _relative_to(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with `engine.path` relative to the current directory instead of `folder`."""
    engine = recipe.engine
    if engine is None or engine.path is None or engine.path.startswith("~"):
        return recipe
    return recipe.but(engine=engine.model_copy(update={"path": str(folder / engine.path)}))


DEEPEST, MOST_FAULTS = 8, 20


def _invalid_values(value: Any, where: str = "", depth: int = 0) -> Iterator[str]:
    """A fault for each value that TOML allows, directly or escaped, and recipes do not."""
    here = one_line(where, 80) or "recipe"
    if depth > DEEPEST:
        yield f"{here}: nested too deeply"
    elif isinstance(value, str) and (control := control_character(value)):
        yield f"{here}: contains the control character {control}"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield f"{here}: the number exceeds 64 bits"
    elif isinstance(value, dict):
        for key, below in value.items():
            if isinstance(key, str) and (control := control_character(key)):
                yield f"{here}: a key contains the control character {control}"
            yield from _invalid_values(below, f"{where}.{key}" if where else str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _invalid_values(below, where, depth + 1)


def _first(faults: Iterator[str]) -> list[str]:
    """The first `MOST_FAULTS` faults, and the number of further ones."""
    first = list(faults)
    more = len(first) - MOST_FAULTS
    return [*first[:MOST_FAULTS], *([f"and {more} more like these"] if more > 0 else [])]


def _fault(detail: Any) -> str:
    """One pydantic error as one line: the key, its value and what is wrong."""
    location = list(detail["loc"])
    if location[:1] == ["cache"]:
        del location[1:2]  # the tag of the union, which pydantic inserts
    where = one_line(".".join(str(part) for part in location), 80) or "recipe"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {where!r}{_closest(detail['loc'])}"
    if detail["type"] == "union_tag_invalid":
        return f"cache.kind = {_shown(detail['ctx']['tag'])}: choose one of {', '.join(CACHES)}"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict | list | tuple):
        return f"{where}: {message}"
    return f"{where} = {_shown(detail['input'])}: {message}"


def _shown(value: Any) -> str:
    return one_line(json.dumps(value, default=str), 80)


CACHES: dict[str, type[Section]] = {
    cache.model_fields["kind"].default: cache
    for cache in (IntervalCache, ScheduleCache, BudgetCache, ResidualCache)
}
SECTIONS: dict[str, type[Section]] = {
    section.__name__.lower(): section
    for section in (Sampling, Fuse, Quantize, Attention, Compile, Engine, Text, Decoder, Offload)
}


def _closest(location: tuple[Any, ...]) -> str:
    """A hint at the valid key that is closest to an unknown one, at pydantic's `location`."""
    section: type[Section] = Recipe
    for part in location[:-1]:
        section = {**SECTIONS, **CACHES}.get(str(part), section)
    known = [*section.model_fields, *(["cache"] if section is Recipe else [])]
    close = difflib.get_close_matches(str(location[-1])[:80], known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _recipe_fix(error: ValidationError) -> str:
    unknown_section = any(
        detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1 for detail in error.errors()
    )
    if unknown_section:
        return f"this version of hasten supports the keys {', '.join(Recipe.model_fields)}"
    return "`hasten recipes show cache-compile` prints a valid recipe; `recipes check` tests yours"
