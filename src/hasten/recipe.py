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
# Learned weights add up to about 1, and none is above 10. Of 1e3, errors of a bfloat16 are as large
# as what is drawn; beyond float32's range the picture is black.
Weight = Annotated[float, Field(ge=-1e3, le=1e3, allow_inf_nan=False)]
Weights = Annotated[tuple[Weight, ...], Field(strict=False, min_length=1, max_length=4)]


class Section(BaseModel):
    """A table of the recipe: unknown keys refused, values never coerced, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _is_a_size(text: str) -> str:
    try:
        parse_size(text)
    except InputError as error:
        raise ValueError(error.faults[0]) from None
    return text


Size = Annotated[str, AfterValidator(_is_a_size)]


class Sampling(Section):
    """Defaults for the pipeline call; what the calling code passes wins."""

    steps: Steps | None = Field(default=None, description="number of inference steps")
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        default=None, description="guidance scale (the distilled one: not true CFG)"
    )
    size: Size | None = Field(default=None, description='"WIDTHxHEIGHT" in pixels, multiples of 16')
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] | None = Field(
        default=None, description="T5 tokens"
    )


class IntervalCache(Section):
    """Compute the steps before `start_step`, then every `interval`-th, all from `end_step` on.

    Pruna's and the article's `cache_interval = k` reuses an output *for* k steps and so is
    `interval = k + 1` here.
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
    """A static plan, usually learned by `hasten calibrate`: which of `steps` steps to compute.

    `sigmas` are the noise levels it was learned on; a run on other ones gets it resampled in
    sigma. `weights`, one row per computed step, combine the newest outputs (newest first) into the
    velocity used from that step to the next computed one; without them `predictor` does.
    `fingerprint` names the model it was learned on.
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
            raise ValueError("compute must begin with step 0: nothing can stand in for it")
        if any(b <= a for a, b in pairwise(self.compute)) or self.compute[-1] >= self.steps:
            raise ValueError(f"compute must rise strictly and stay below steps = {self.steps}")
        for name, given, length in (
            ("weights", self.weights, len(self.compute)),
            ("sigmas", self.sigmas, self.steps),
        ):
            if given is not None and len(given) != length:
                raise ValueError(f"{name} must have {length} entries, it has {len(given)}")
        if self.sigmas is not None and any(b >= a for a, b in pairwise(self.sigmas)):
            raise ValueError("sigmas must fall strictly, as noise does")
        return self


class BudgetCache(Section):
    """Compute `budget` steps: by the schedule learned for this model, else by the generic one."""

    kind: Literal["budget"] = Field(default="budget", description="this kind; may be left out")
    budget: Annotated[int, Field(ge=1, le=1000)] = Field(description="number of steps to compute")


class ResidualCache(Section):
    """Run the first blocks of every step, the others only where what the first ones add changed.

    What they add to the image tokens (their residual) is compared with that of the last computed
    step; below `threshold` the last known residual of the other blocks stands in for them. How
    many steps are computed depends on the picture, and each decision waits for the device.
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
    """Work done once per run instead of per step, and kernels that do several things in one pass.

    `conditioning`: the AdaLN modulations of all steps come from one table made before the first
    step; so do the rotary and text embeddings. `kernels`: the blocks run on hasten's own fused
    kernels; "auto" does so where nothing stands in the way and says why where something does.
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
    rounds as the scheme does and multiplies in the pipeline's dtype: the scheme's quality on any
    device, without its speed.

    `activations`: scaled as they come ("dynamic"), or with one scale per linear from `amax`
    ("static", `fp8` only), the largest absolute input that each linear saw when
    `hasten calibrate-scales` watched the model that `fingerprint` names. Larger inputs
    become the largest code. `granularity` is then that of the weights alone.
    """

    scheme: Literal["fp8", "int8", "fp8-weight", "int8-weight"] = Field(
        default="fp8", description="format of weights and activations, or of weights only"
    )
    granularity: Literal["row", "tensor"] = Field(
        default="row", description="one scale per row (token, output channel) or per tensor"
    )
    skip: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="linears to leave alone, as patterns: transformer_blocks.0.*"
    )
    emulate: bool = Field(
        default=False, description="round as the scheme does, multiply in the pipeline's dtype"
    )
    activations: Literal["dynamic", "static"] = Field(
        default="dynamic", description="scales found in each call, or calibrated ones"
    )
    amax: Mapping[str, Largest] | None = Field(
        default=None, description="largest absolute input of each linear, by its name"
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
                'activations = "static" needs [quantize.amax]: `hasten calibrate-scales` '
                "measures it and writes the recipe"
            )
        return self


class Attention(Section):
    """Which kernel multiplies queries, keys and values; "auto" times them once per shape."""

    backend: Literal["auto", "native", "cudnn", "flash", "efficient", "math"] = Field(
        default="auto", description='attention kernel; "native" is what torch chooses'
    )


class Compile(Section):
    """torch.compile of the repeated blocks (one compilation per block class) or of the whole step.

    `cuda_graphs`: record the step's kernels once per shape and replay them as one launch; mode
    "none" does that without torch.compile.
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
        description="true: shapes symbolic from the start; absent: once a shape has changed",
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.mode == "none" and self.cuda_graphs == "off":
            raise ValueError('mode = "none" without cuda_graphs does nothing: leave [compile] out')
        return self


class Text(Section):
    """Text encoders: embeddings of past prompts kept, and weights in eight bits."""

    cache_mb: Annotated[int, Field(ge=0, le=65536)] = Field(
        default=0, description="size of the cache of prompt embeddings, in MiB; 0 keeps none"
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
        default="off", description='"auto" tiles pictures over 2048x2048 pixels'
    )


class Offload(Section):
    """Where weights wait.

    `model` keeps one component at a time on the accelerator. `modulation` keeps the weights that
    make the conditioning table in host memory and brings them over layer by layer when it is made.
    """

    kind: Literal["none", "model", "modulation"] = Field(
        default="none", description="which weights are kept in host memory until they are needed"
    )


class Engine(Section):
    """The transformer's blocks as an exported graph that an engine runs, in torch's place.

    `onnxruntime` runs the graph of the TensorRT engine on a CPU: for its pictures, not for speed.
    """

    kind: Literal["tensorrt", "onnxruntime"] = Field(
        default="tensorrt", description="what runs the graph"
    )
    precision: Literal["bf16", "fp16", "fp8"] = Field(
        default="fp8", description="number format of the graph's linears"
    )
    calibration: Literal["max", "smoothquant"] = Field(
        default="max", description="how fp8 finds the scales of the inputs of its linears"
    )
    max_size: Size | None = Field(
        default=None, description="WIDTHxHEIGHT of the largest picture; absent: 2048x2048"
    )
    path: str | None = Field(
        default=None,
        description="what `hasten export tensorrt` wrote, from a recipe file's own folder on; "
        "absent: exported once, then kept",
    )
    verify: bool = Field(default=True, description="hold the graph to torch when it is exported")
    release: bool = Field(default=False, description="free the torch weights of the blocks")

    @model_validator(mode="after")
    def _is_made_or_brought(self) -> Self:
        making = ("max_size", "calibration", "verify")
        fields = type(self).model_fields
        settled = [name for name in making if getattr(self, name) != fields[name].default]
        if self.path is not None and settled:
            raise ValueError(
                f"{', '.join(settled)}: for making an engine, and path brings a finished one: "
                "leave out one or the other"
            )
        return self


class Recipe(Section):
    """All passes of one optimisation. Order: quantize, fuse, compile, cache, text to offload.

    `name` stands in results and file names. A recipe that was read from a file is called as the
    file is, whatever name the file gives: copies of one recipe can be told apart.
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
        """Parse TOML text; every fault is reported at once as one RecipeError."""
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
            f"{source}: {reason}", "see `hasten recipes show cache` for a recipe that is valid"
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, source: str = "recipe") -> Recipe:
        """Validate plain data; every fault is reported at once as one RecipeError."""
        if odd := list(_odd_values(data)):
            raise RecipeError(_first(f"{source}: {fault}" for fault in odd), "correct these values")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            faults = _first(f"{source}: {_fault(detail)}" for detail in error.errors())
            raise RecipeError(faults, _recipe_fix(error)) from None

    def to_toml(self) -> str:
        """TOML text that `from_toml` reads back to an equal recipe; unset values are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema (draft 2020-12) of the TOML file, for editors and other tools."""
        return cls.model_json_schema()

    @property
    def changes_nothing(self) -> bool:
        """Whether there is no section in it, so that the pipeline runs as it is."""
        return not self.model_dump(exclude_none=True, exclude={"name", "description"})

    @property
    def compiles(self) -> bool:
        """Whether torch.compile takes part in the transformer's work."""
        return self.compile is not None and self.compile.mode != "none"

    def but(self, **changes: Any) -> Recipe:
        """A validated copy with some sections replaced, e.g. `recipe.but(cache=None)`."""
        return Recipe.model_validate({**dict(self), **changes})


def parse_size(text: str, *, at_most: bool = False) -> tuple[int, int]:
    """`"512x768"` -> (width, height) in pixels; both positive multiples of 16, at most 8192.

    at_most: it is the largest of several, so that InputError names no smaller one instead.
    """
    match = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", text.strip())
    if match is None:
        raise InputError(f"size {text!r} is not WIDTHxHEIGHT", "write for example 512x512")
    width, height = int(match[1]), int(match[2])
    faults = [
        f"{side} {value} is not a multiple of 16 between 16 and 8192"
        for side, value in (("width", width), ("height", height))
        if value % 16 or not 16 <= value <= 8192
    ]
    if faults:
        rounded = math.ceil if at_most else round
        nearest = "x".join(
            str(min(8192, max(16, rounded(value / 16) * 16))) for value in (width, height)
        )
        raise InputError(faults, f"the nearest size that works is {nearest}")
    return width, height


def preset_names() -> list[str]:
    """Names of the presets in the package, in the order of their use; `baseline` is the last."""
    return list(GUIDES)


def resolve(recipe: str | Path | Recipe) -> Recipe:
    """A recipe from a Recipe, a preset's name or the path of a .toml file."""
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

    Its name is the file's, without `.toml`; `engine.path` starts at the file's folder.

    Raises:
        InputError: The file cannot be read.
        RecipeError: It is no valid recipe.
    """
    text = read_text(path, "recipe file", "give a preset's name, or the path of a TOML file")
    recipe = Recipe.from_toml(text, source=str(path))
    return _found_from(path.parent, recipe.but(name=_name_of(path.stem)))


def _name_of(stem: str) -> str:
    """A file's stem as a recipe's name: ASCII letters and digits, 64 characters at most."""
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")
    if name and len(name) <= 64:
        return name
    digest = hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[:55] or 'recipe'}-{digest}"


def _found_from(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with an `engine.path` that can be followed from where we are."""
    engine = recipe.engine
    if engine is None or engine.path is None or engine.path.startswith("~"):
        return recipe
    return recipe.but(engine=engine.model_copy(update={"path": str(folder / engine.path)}))


DEEPEST, MOST_FAULTS = 8, 20


def _odd_values(value: Any, where: str = "", depth: int = 0) -> Iterator[str]:
    """A fault for each value that TOML has, or allows in an escape, and no recipe can use."""
    here = one_line(where, 80) or "recipe"
    if depth > DEEPEST:
        yield f"{here}: nested too deeply"
    elif isinstance(value, str) and (control := control_character(value)):
        yield f"{here}: has the control character {control}"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield f"{here}: a number beyond 64 bits"
    elif isinstance(value, dict):
        for key, below in value.items():
            if isinstance(key, str) and (control := control_character(key)):
                yield f"{here}: a key has the control character {control}"
            yield from _odd_values(below, f"{where}.{key}" if where else str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _odd_values(below, where, depth + 1)


def _first(faults: Iterator[str]) -> list[str]:
    """As many faults as someone reads, and how many more there are."""
    first = list(faults)
    more = len(first) - MOST_FAULTS
    return [*first[:MOST_FAULTS], *([f"and {more} more like these"] if more > 0 else [])]


def _fault(detail: Any) -> str:
    """One pydantic error as one line: where, what is wrong, what was given."""
    location = list(detail["loc"])
    if location[:1] == ["cache"]:
        del location[1:2]  # the kind, which pydantic puts there
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
    """The known key nearest to an unknown one; `location` is pydantic's path to it."""
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
        return f"this version of hasten knows the keys {', '.join(Recipe.model_fields)}"
    return "`hasten recipes show cache-compile` prints a valid recipe; `recipes check` tests yours"
