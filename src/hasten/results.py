"""The data model of `results.json`, schema 2, which benchmarks write and reports read.

The models are frozen. They refuse unknown keys, NaN, infinity, and every summary that does not
follow from its samples, so a file that loads can be formatted without further checks. Values that
were not measured are `None`. A row that could not run stays in the results, with the reason.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION: Literal[2] = 2
BASELINE = "baseline"
BASELINE_AGAIN = "baseline-again"

Role = Literal["baseline", "recipe", "rival", "graph", "peer"]

# The upper bounds are far beyond anything that can be measured; a larger value is damage.
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Duration = Annotated[float, Field(ge=0, le=1e9)]
Lpips = Annotated[float, Field(ge=0, le=1e3)]
# [-1, 1] with a margin for float32 rounding, which must not make a finished run unreadable.
Ssim = Annotated[float, Field(ge=-1.001, le=1.001)]
Psnr = Annotated[float, Field(ge=0, le=100)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Extra = Annotated[float, Field(ge=-1e15, le=1e15)]
MOST_ROWS = 200
SHORTEST = 1e-9  # seconds: no speed-up is computed from less


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_by_name=True
    )


def _agree(stored: float | None, computed: float | None) -> bool:
    """Whether a stored summary follows from its samples, up to rounding."""
    if stored is None or computed is None:
        return stored is computed
    return math.isclose(stored, computed, rel_tol=1e-3, abs_tol=1e-4)


class Prompt(_Record):
    """One prompt and the seed of its noise, the same for every row."""

    id: Count
    text: str
    seed: Count


class Workload(_Record):
    """What every row renders.

    Attributes:
        model: Name or path of the model.
        width: In pixels.
        height: In pixels.
        steps: Number of inference steps, including those that a cache skips.
        guidance: Guidance scale; None for models without one.
        seed: Seed of the first prompt.
        dtype: Of the weights, as torch names it.
        prompt_source: Name of the bundled set, or path of the file.
        prompts: In the order in which they are rendered.
        max_sequence_length: T5 tokens; None where it was not recorded.
        rounds: How often each row renders the prompts.
    """

    model: str
    width: Positive
    height: Positive
    steps: Positive
    guidance: float | None
    seed: Count
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
    """The machine and the library versions of a benchmark.

    Versions are as the libraries print them, and `date` is in ISO 8601. `packages` has the
    versions of further libraries that rows used, by name.
    """

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
    packages: dict[str, str] = Field(default_factory=dict)


class Seconds(_Record):
    """Seconds per image: all samples and their summary (see `summarize_seconds`)."""

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
    """Number of denoising steps per image on which the transformer blocks ran."""

    mean: Duration
    min: Count
    max: Count

    @model_validator(mode="after")
    def _mean_is_between(self) -> Self:
        if not self.min - 1e-6 <= self.mean <= self.max + 1e-6:
            raise ValueError(f"mean is {self.mean}, but min is {self.min} and max {self.max}")
        return self


class PromptQuality(_Record):
    """Metrics of one image against the reference image of its prompt; PSNR in dB, at most 100."""

    id: Count
    lpips: Lpips | None
    ssim: Ssim | None
    psnr: Psnr | None
    ms_ssim: Ssim | None = None


class Quality(_Record):
    """Means over the `n` entries of `per_prompt`.

    A metric is None if any prompt lacks it. `reason` then explains why: an image too small for
    MS-SSIM, random weights or a failed reference.
    """

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
    """One recipe, or one other library, on the workload.

    Attributes:
        recipe: The row's name, unique among the rows.
        role: The purpose of the row: the plain pipeline, rendered first and last (`baseline`); a
            requested recipe (`recipe`); the same number of steps as a cached recipe computes, but
            without a cache (`rival`); the graph of an engine on a CPU, which is scored but not
            compared in speed (`graph`); or another library (`peer`).
        rival_of: Names of the cached rows that this row is the fewer-steps rival of. A requested
            recipe can be a rival, too.
        seconds_per_image: None if images were scored but not timed.
        speedup: Seconds of the baseline (`Results.baseline_seconds`) over this row's median.
        transformer_ms_per_step: Milliseconds per step of the sampling loop alone.
        setup_seconds: Seconds for loading and optimising.
        first_image_seconds: Seconds of the first call, including compilation.
        calibrated: Whether the schedule was learned on this model; None without a schedule.
        images: One path per prompt, in order, relative to the results file.
        toml: The recipe as it was run, or the settings of a peer.
        extra: Further numbers, by the heading of their column, which includes the unit.
    """

    recipe: Name
    role: Role
    rival_of: tuple[str, ...] = ()
    status: Literal["ok", "unsupported", "failed"]
    reason: str | None = None
    notes: tuple[str, ...] = ()
    calibrated: bool | None = None
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
    extra: dict[Name, Extra] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_explained(self) -> Self:
        if self.status == "ok" and not (self.seconds_per_image or self.steps_computed):
            raise ValueError("status is ok, but seconds_per_image and steps_computed are null")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"status is {self.status}, but reason is missing")
        if self.status != "ok" and self.seconds_per_image is not None:
            raise ValueError(f"status is {self.status}, but seconds_per_image is not null")
        if (self.role == "baseline") != (self.recipe in (BASELINE, BASELINE_AGAIN)):
            raise ValueError(f"role is {self.role}, but the row is named {self.recipe!r}")
        references = [quality.reference for quality in self.quality]
        if len(set(references)) != len(references):
            raise ValueError("quality has two entries with the same reference")
        for image in self.images:
            path = PurePosixPath(image)
            if path.is_absolute() or ".." in path.parts or "\\" in image or "\0" in image:
                raise ValueError(f"image path {image!r} leaves the results directory")
        return self

    def quality_against(self, reference: str) -> Quality | None:
        """The quality entry against the row named `reference`, or None."""
        return next((entry for entry in self.quality if entry.reference == reference), None)


class Results(_Record):
    """A whole benchmark.

    `rows[0]` is the baseline. If the baseline was rendered a second time, the last row is
    `baseline-again`. `command` is the command line that repeats the measurement.
    """

    schema_version: Literal[2] = Field(default=SCHEMA_VERSION, alias="schema")
    workload: Workload
    environment: Environment
    rows: Annotated[tuple[Row, ...], Field(max_length=MOST_ROWS)]
    command: str | None = None

    @model_validator(mode="after")
    def _rows_fit_together(self) -> Self:
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
            named = {*row.rival_of, *(entry.reference for entry in row.quality)}
            if missing := ", ".join(sorted(named - set(names))):
                raise ValueError(f"row {row.recipe!r} refers to missing rows: {missing}")
            speedup = _speedup(row, self.baseline_seconds)
            if not _agree(row.speedup, speedup):
                raise ValueError(
                    f"row {row.recipe!r} has speedup {row.speedup}, but the samples give {speedup}"
                )
        return self

    def _check_prompts(self, row: Row) -> None:
        prompts = [prompt.id for prompt in self.workload.prompts]
        count = len(prompts)
        if row.images and len(row.images) != count:
            raise ValueError(f"row {row.recipe!r} has {len(row.images)} images for {count} prompts")
        for quality in row.quality:
            scored = [entry.id for entry in quality.per_prompt]
            if unknown := set(scored) - set(prompts):
                raise ValueError(f"row {row.recipe!r} scores unknown prompts {sorted(unknown)}")
            if scored and sorted(scored) != sorted(prompts):
                raise ValueError(
                    f"row {row.recipe!r} scores {len(set(scored))} of {count} prompts "
                    f"against {quality.reference!r}, in {len(scored)} entries"
                )
        timed = row.seconds_per_image.n if row.seconds_per_image else 0
        if timed and timed not in range(count, count * self.workload.rounds + 1, count or 1):
            raise ValueError(
                f"row {row.recipe!r} has {timed} samples for {count} prompts "
                f"in {self.workload.rounds} rounds"
            )

    @property
    def baseline_seconds(self) -> float | None:
        """Seconds per image of the baseline, which every speed-up is relative to.

        This is the mean of the two baselines' medians. If the machine gets steadily slower (or
        faster), this is its speed in the middle of the benchmark, and rows near either end are off
        by at most `uncertainty`. Without a second baseline, it is the median of the first. None if
        the first baseline was not measured.
        """
        return _baseline_seconds(self.rows)

    @property
    def uncertainty(self) -> float | None:
        """Relative error of each speed-up that drift of the machine can cause.

        Half the difference of the two baselines over their mean. None if only one was
        measured.
        """
        medians = _baseline_medians(self.rows)
        return abs(medians[1] - medians[0]) / math.fsum(medians) if len(medians) == 2 else None

    @property
    def drift(self) -> float | None:
        """Median seconds of the last baseline over those of the first.

        1.02 means that the machine became 2 % slower. None if either was not measured.
        """
        medians = _baseline_medians(self.rows)
        return medians[1] / medians[0] if len(medians) == 2 else None


def _baseline_medians(rows: Sequence[Row]) -> list[float]:
    """Median seconds of the first row and, if it is a second baseline, of the last row."""
    ends = [rows[0], *(row for row in rows[1:][-1:] if row.recipe == BASELINE_AGAIN)]
    medians = [row.seconds_per_image.median for row in ends if row.seconds_per_image]
    measured = rows[0].seconds_per_image is not None and min(medians) >= SHORTEST
    return medians if measured else []


def _baseline_seconds(rows: Sequence[Row]) -> float | None:
    medians = _baseline_medians(rows)
    return math.fsum(medians) / len(medians) if medians else None


def _speedup(row: Row, baseline: float | None) -> float | None:
    seconds = row.seconds_per_image
    if baseline is None or seconds is None or seconds.median < SHORTEST or row.role == "graph":
        return None
    return baseline / seconds.median


def with_speedups(
    workload: Workload,
    environment: Environment,
    rows: Iterable[Row],
    command: str | None = None,
) -> Results:
    """Results of `rows`, which are in the table's order, with each row's speed-up computed."""
    rows = tuple(rows)
    baseline = _baseline_seconds(rows)
    finished = tuple(
        Row.model_validate({**dict(row), "speedup": _speedup(row, baseline)}) for row in rows
    )
    return Results(workload=workload, environment=environment, rows=finished, command=command)


def _summary(samples: tuple[float, ...]) -> dict[str, float]:
    deciles = (
        statistics.quantiles(samples, n=10, method="inclusive") if samples[1:] else samples * 9
    )
    mean = math.fsum(samples) / len(samples)
    return {"median": deciles[4], "mean": mean, "p10": deciles[0], "p90": deciles[8]}


def summarize_seconds(samples: Sequence[float]) -> Seconds:
    """Median, mean, 10th and 90th percentile of at least one sample, in seconds.

    Raises:
        ValueError: There are no samples, or one is negative or not finite.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    samples = tuple(samples)
    return Seconds(**_summary(samples), n=len(samples), samples=samples)


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
    """Mean metrics over `per_prompt`; a metric that any prompt lacks is None.

    `reason` is required if there are no prompts, or neither LPIPS, SSIM nor PSNR.
    """
    return Quality(
        reference=reference,
        **_metric_means(per_prompt),
        reason=reason,
        n=len(per_prompt),
        per_prompt=tuple(per_prompt),
    )
