"""What a benchmark writes and a report reads: `results.json`, version 1.

The models are frozen and refuse unknown keys, NaN and infinity, so a file that loads can be
formatted without a second look. What was not measured is `None`; a row that could not run keeps
its place and its reason.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hasten.errors import InputError

__all__ = [
    "BASELINE",
    "BASELINE_AGAIN",
    "SCHEMA_VERSION",
    "Environment",
    "Prompt",
    "PromptQuality",
    "Quality",
    "Results",
    "Row",
    "Seconds",
    "StepsComputed",
    "Workload",
    "read_results",
    "summarize_quality",
    "summarize_seconds",
    "write_results",
]

SCHEMA_VERSION: Literal[1] = 1
BASELINE = "baseline"
BASELINE_AGAIN = "baseline-again"

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Duration = Annotated[float, Field(ge=0)]
Lpips = Annotated[float, Field(ge=0)]
# [-1, 1] with room for the rounding of float32 sums, which may not cost anyone a finished run.
Ssim = Annotated[float, Field(ge=-1.001, le=1.001)]
Psnr = Annotated[float, Field(ge=0, le=100)]


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_by_name=True
    )


def _agree(stored: float | None, computed: float | None) -> bool:
    """A summary may be stored rounded; one that tells another story than its samples may not."""
    if stored is None or computed is None:
        return stored is computed
    return math.isclose(stored, computed, rel_tol=1e-3, abs_tol=1e-4)


class Prompt(_Record):
    """One prompt and the seed its noise is drawn with, the same for every row."""

    id: int
    text: str
    seed: int


class Workload(_Record):
    """What every row renders. `steps` is the full number, before any cache skips some."""

    model: str
    width: Positive
    height: Positive
    steps: Positive
    guidance: float | None
    seed: int
    dtype: str
    prompt_source: str
    prompts: tuple[Prompt, ...]
    max_sequence_length: Positive | None = None
    rounds: Positive = 1

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        ids = [prompt.id for prompt in self.prompts]
        if len(set(ids)) != len(ids):
            raise ValueError("two prompts have the same id")
        return self


class Environment(_Record):
    """Where it was measured: versions as the libraries print them, `date` in ISO 8601."""

    device: str
    torch: str
    diffusers: str
    hasten: str
    date: str
    cuda: str | None = None
    commit: str | None = None
    python: str | None = None
    transformers: str | None = None
    os: str | None = None
    cpu: str | None = None
    threads: Positive | None = None
    gpu: str | None = None
    gpu_memory_bytes: Count | None = None
    driver: str | None = None


class Seconds(_Record):
    """Seconds for one image: every sample, and what is said of them (see `summarize_seconds`)."""

    median: Duration
    mean: Duration
    p10: Duration
    p90: Duration
    n: Positive
    samples: tuple[Duration, ...]

    @model_validator(mode="after")
    def _summary_follows_samples(self) -> Self:
        if len(self.samples) != self.n:
            raise ValueError(f"n is {self.n}, but there are {len(self.samples)} samples")
        for name, value in _summary(self.samples).items():
            stored = getattr(self, name)
            if not _agree(stored, value):
                raise ValueError(f"{name} is {stored}, but the samples give {value}")
        return self


class StepsComputed(_Record):
    """Denoising steps for which the transformer blocks really ran, over all images of a row."""

    mean: Duration
    min: Count
    max: Count


class PromptQuality(_Record):
    """One image against the reference image of the same prompt; PSNR in dB, capped at 100."""

    id: int
    lpips: Lpips | None
    ssim: Ssim | None
    psnr: Psnr | None
    ms_ssim: Ssim | None = None


class Quality(_Record):
    """Means over `per_prompt`, which has `n` entries. A metric is null if any prompt lacks it,
    and `reason` says why (sides too short for MS-SSIM, random weights, a failed reference)."""

    reference: str
    lpips: Lpips | None
    ssim: Ssim | None
    psnr: Psnr | None
    ms_ssim: Ssim | None
    reason: str | None
    n: Count
    per_prompt: tuple[PromptQuality, ...]

    @model_validator(mode="after")
    def _means_follow_prompts(self) -> Self:
        if len(self.per_prompt) != self.n:
            raise ValueError(f"n is {self.n}, but per_prompt has {len(self.per_prompt)} entries")
        if {self.lpips, self.ssim, self.psnr} == {None} and not self.reason:
            raise ValueError("there is no metric and no reason")
        for name, value in _metric_means(self.per_prompt).items():
            stored = getattr(self, name)
            if not _agree(stored, value):
                raise ValueError(f"{name} is {stored}, but per_prompt gives {value}")
        return self


class Row(_Record):
    """One recipe (or one peer library) on the workload.

    `speedup` is the baseline's median over this row's. `setup_seconds` is loading, optimising and
    compiling; `first_image_seconds` the first call, warm-up included. `calibrated` is None where no
    schedule is involved. `images` has one path per prompt, in order, relative to the results file.
    `quality_only`: it is there for its pictures, what it took says nothing and is not compared.
    """

    recipe: str
    peer: str | None = None
    status: Literal["ok", "unsupported", "failed"]
    reason: str | None = None
    notes: tuple[str, ...] = ()
    calibrated: bool | None = None
    quality_only: bool = False
    seconds_per_image: Seconds | None = None
    speedup: Duration | None = None
    transformer_ms_per_step: Duration | None = None
    steps_computed: StepsComputed | None = None
    setup_seconds: Duration | None = None
    first_image_seconds: Duration | None = None
    peak_memory_bytes: Count | None = None
    weights_bytes: Count | None = None
    quality: tuple[Quality, ...] = ()
    images: tuple[str, ...] = ()
    toml: str | None = None

    @model_validator(mode="after")
    def _status_is_explained(self) -> Self:
        if self.status == "ok" and self.seconds_per_image is None:
            raise ValueError("status is ok, but seconds_per_image is null")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"status is {self.status}, but there is no reason")
        for image in self.images:
            path = PurePosixPath(image)
            if path.is_absolute() or ".." in path.parts or "\\" in image:
                raise ValueError(f"image path {image!r} leaves the results directory")
        return self

    def quality_against(self, reference: str) -> Quality | None:
        """The quality entry whose reference is the row named `reference`, if there is one."""
        return next((entry for entry in self.quality if entry.reference == reference), None)


class Results(_Record):
    """A whole benchmark. `rows[0]` is the baseline; its second rendering, where there is one, is
    the last row, `baseline-again`."""

    schema_version: Literal[1] = Field(default=SCHEMA_VERSION, alias="schema")
    workload: Workload
    environment: Environment
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _rows_fit_the_workload(self) -> Self:
        names = [row.recipe for row in self.rows]
        if not names or names[0] != BASELINE:
            raise ValueError(f"the first row must be {BASELINE!r}")
        if BASELINE_AGAIN in names[:-1]:
            raise ValueError(f"{BASELINE_AGAIN!r} must be the last row")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"more than one row is named {', '.join(twice)}")
        for row in self.rows:
            self._check_prompts(row)
        return self

    def _check_prompts(self, row: Row) -> None:
        prompts = self.workload.prompts
        if row.images and len(row.images) != len(prompts):
            raise ValueError(
                f"row {row.recipe!r} has {len(row.images)} images for {len(prompts)} prompts"
            )
        unknown = {entry.id for quality in row.quality for entry in quality.per_prompt}
        unknown -= {prompt.id for prompt in prompts}
        if unknown:
            raise ValueError(f"row {row.recipe!r} scores unknown prompts {sorted(unknown)}")

    def row_by_name(self, recipe: str) -> Row:
        """The row of `recipe`; InputError names the rows there are."""
        for row in self.rows:
            if row.recipe == recipe:
                return row
        names = ", ".join(row.recipe for row in self.rows)
        raise InputError(f"no row is named {recipe!r}", fix=f"choose one of: {names}")

    @property
    def drift(self) -> float | None:
        """Median seconds of the last baseline over the first: 1.02 means the machine got 2 %
        slower on the way. None where one of the two was not measured."""
        first, last = self.rows[0].seconds_per_image, self.rows[-1].seconds_per_image
        if self.rows[-1].recipe != BASELINE_AGAIN or first is None or last is None:
            return None
        return last.median / first.median if first.median else None


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy.percentile does by default."""
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _summary(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {
        "median": _percentile(ordered, 0.5),
        "mean": math.fsum(ordered) / len(ordered),
        "p10": _percentile(ordered, 0.1),
        "p90": _percentile(ordered, 0.9),
    }


def summarize_seconds(samples: Sequence[float]) -> Seconds:
    """Median, mean, 10th and 90th percentile of at least one sample, in seconds.

    Raises ValueError without samples, for a negative one or one that is not finite.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    return Seconds(**_summary(samples), n=len(samples), samples=tuple(samples))


def _metric_means(per_prompt: Sequence[PromptQuality]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in ("lpips", "ssim", "psnr", "ms_ssim"):
        values = [getattr(entry, name) for entry in per_prompt]
        complete = bool(values) and None not in values
        means[name] = math.fsum(values) / len(values) if complete else None
    return means


def summarize_quality(
    reference: str, per_prompt: Sequence[PromptQuality], reason: str | None = None
) -> Quality:
    """Means over `per_prompt`; a metric that any prompt lacks is null. Without prompts (or without
    LPIPS, SSIM and PSNR) `reason` must say why."""
    return Quality(
        reference=reference,
        **_metric_means(per_prompt),
        reason=reason,
        n=len(per_prompt),
        per_prompt=tuple(per_prompt),
    )


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read and check a results file. InputError lists every fault, one line each."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file", fix="run `hasten bench --out DIR`, then use DIR/results.json"
        ) from None
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}", fix="name a results.json that can be read"
        ) from None
    except ValueError as error:  # both JSONDecodeError and UnicodeDecodeError are
        raise InputError(
            f"{path}: not JSON: {error}", fix="name a results.json that `hasten bench` wrote"
        ) from None
    _check_version(path, data)
    try:
        return Results.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(
            [f"{path}: {_describe(fault)}" for fault in error.errors()],
            fix="write the file with `hasten bench`, or correct the fields named above",
        ) from None


def _check_version(path: Path, data: Any) -> None:
    found = data.get("schema") if isinstance(data, dict) else None
    if found is None:
        raise InputError(
            f"{path}: not a results file: it has no schema version",
            fix="name a results.json that `hasten bench` wrote",
        )
    if type(found) is not int or found != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema {found!r} is not known; this version reads {SCHEMA_VERSION}",
            fix="run the benchmark again with this version, or install the version that wrote it",
        )


def _describe(fault: ErrorDetails) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    what = fault["msg"].removeprefix("Value error, ")
    return f"{where.removeprefix('.')}: {what}" if where else what


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write `results` in one step: readers see the old file or the whole new one.

    Raises InputError where the place cannot be written or a value is NaN or infinite.
    """
    path = Path(path)
    data = results.model_dump(mode="python", by_alias=True)
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(
            f"{path}: not written: {error}", fix="record what was not measured as null"
        ) from None
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}", fix="choose a directory that exists"
        ) from None
    finally:
        draft.unlink(missing_ok=True)
