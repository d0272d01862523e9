"""Times the presets on FLUX.1-dev's shape, at 50 and at 28 steps, in one process.

    python -m studies.presets --out DIR

Each preset is applied to a copy of one pipeline that shares its weights, timed, and dropped. The
plain pipeline draws again after each preset, so the baseline has samples from the whole run. Every
image is a whole call: prompts are encoded and latents decoded. `DIR/SIZE-STEPS/` gets the product's
`results.json` and report for each number of steps.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.benchmark.environment import detect
from hasten.recipe import resolve
from hasten.report import write_report
from hasten.results import (
    BASELINE,
    Prompt,
    Row,
    StepsComputed,
    Workload,
    summarize_quality,
    summarize_seconds,
    with_speedups,
)
from hasten.results_file import write_results

PRESETS = ("lossless", "int8", "fp8", "balanced", "max", "compile")
STEPS = (50, 28)
PROMPT = "a red panda reading a newspaper on a park bench, autumn leaves on the ground, photograph"
UNSCORED = summarize_quality(BASELINE, (), "random weights: pictures were not scored")


class Clock:
    """Times whole calls of a pipeline, and keeps the seconds for each number of steps."""

    def __init__(self, model: str, device: str, size: int, steps: Sequence[int]) -> None:
        self.size = size
        self.steps = steps
        self.device = device
        self.pipe: Any = hasten.load_pipeline(model, device=device)

    def image(self, pipe: Any, steps: int) -> float:
        """Seconds of one image."""
        generator = torch.Generator(self.device).manual_seed(0)
        self._wait()
        begun = time.perf_counter()
        pipe(
            PROMPT,
            width=self.size,
            height=self.size,
            num_inference_steps=steps,
            guidance_scale=3.5,
            generator=generator,
        )
        self._wait()
        return time.perf_counter() - begun

    def preset(self, name: str, rounds: int) -> dict[int, Row]:
        """A row of each results file."""
        begun = time.perf_counter()
        fast = hasten.optimize(self.pipe, resolve(name), copy=True)
        self._wait()
        setup = time.perf_counter() - begun
        first = self.image(fast, self.steps[0])
        rows = {}
        for steps in self.steps:
            self.image(fast, steps)
            seconds = [self.image(fast, steps) for _ in range(rounds)]
            computed = fast.last_run.computed
            rows[steps] = Row(
                recipe=name,
                role="recipe",
                status="ok",
                notes=fast.notes,
                calibrated=fast.calibrated,
                seconds_per_image=summarize_seconds(seconds),
                steps_computed=StepsComputed(mean=computed, min=computed, max=computed),
                setup_seconds=setup,
                first_image_seconds=first,
                quality=(UNSCORED,),
                toml=fast.recipe.to_toml(),
            )
        return rows

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def baseline(seconds: Sequence[float], steps: int) -> Row:
    """The plain pipeline's row."""
    return Row(
        recipe=BASELINE,
        role="baseline",
        status="ok",
        notes=("drawn between the presets",),
        seconds_per_image=summarize_seconds(seconds),
        steps_computed=StepsComputed(mean=steps, min=steps, max=steps),
    )


def write(out: Path, clock: Clock, model: str, steps: int, rows: Sequence[Row]) -> None:
    """The results and the report for one number of steps."""
    detected = detect("tiny", clock.device, "auto")
    workload = Workload(
        model=model,
        width=clock.size,
        height=clock.size,
        steps=steps,
        guidance=3.5,
        seed=0,
        dtype=detected.dtype,
        prompt_source="studies.presets",
        prompts=(Prompt(id=0, text=PROMPT, seed=0),),
        max_sequence_length=512,
        rounds=max(row.seconds_per_image.n for row in rows if row.seconds_per_image),
    )
    folder = out / f"{clock.size}-{steps}"
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.json", with_speedups(workload, detected.environment, rows))
    write_report(folder / "results.json", folder)


def main() -> None:
    """Time all presets; what is measured is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="shape:flux.1-dev")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    options = parser.parse_args()
    clock = Clock(options.model, options.device, options.size, options.steps)
    plain: dict[int, list[float]] = {steps: [] for steps in options.steps}
    rows: dict[int, list[Row]] = {steps: [] for steps in options.steps}
    clock.image(clock.pipe, options.steps[0])
    for name in options.presets:
        for steps, row in clock.preset(name, options.rounds).items():
            plain[steps].append(clock.image(clock.pipe, steps))
            rows[steps].append(row)
            write(
                options.out,
                clock,
                options.model,
                steps,
                [baseline(plain[steps], steps), *rows[steps]],
            )
            assert row.seconds_per_image is not None
            print(
                f"{name} {steps}: {row.seconds_per_image.median:.3f} s", file=sys.stderr, flush=True
            )
        gc.collect()
        if clock.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
