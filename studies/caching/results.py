"""Scores as the product's results: one `results.json` for each model and budget."""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.caching.methods import METHODS
from studies.caching.workload import MODELS, SIZE, STEPS, Prompt
from studies.settings import settings_toml

from hasten import results
from hasten.recipe import Recipe
from hasten.results import (
    BASELINE,
    Environment,
    PromptQuality,
    Results,
    Role,
    Row,
    StepsComputed,
    Workload,
    summarize_quality,
    with_speedups,
)
from hasten.results_file import read_results, write_results

__all__ = [
    "Score",
    "failed_row",
    "folder_of",
    "merged",
    "package_of",
    "put",
    "scored_row",
    "setting_of",
    "workload_of",
]

Setting = dict[str, Any]
PLAIN = "fewer steps, Euler"  # the plain pipeline in fewer steps: the rival of every cache
ORDER: dict[Role, int] = {"baseline": 0, "recipe": 1, "rival": 2, "peer": 3, "graph": 4}


@dataclass(frozen=True)
class Score:
    """Per prompt: distance and similarity to the reference, and cost."""

    lpips: list[float]
    ssim: list[float]
    psnr: list[float]
    evaluations: list[float]
    computed: list[float]

    def __add__(self, other: Score) -> Score:
        mine, theirs = asdict(self), asdict(other)
        return Score(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def cost(self) -> float:
        return statistics.mean(self.evaluations)


def folder_of(root: Path, model: str, budget: float, blocks: int | None = None) -> Path:
    """Where the results of a model at a budget are, charged as in a model of so many blocks."""
    deep = f"-as-{blocks}-blocks" if blocks else ""
    return root / f"{model}{deep}-{budget:g}"


def package_of(name: str) -> str:
    """The library that a row comes from."""
    return METHODS[name].package if name in METHODS else "hasten"


def _role_of(name: str) -> Role:
    if name in (BASELINE, PLAIN):
        return "baseline" if name == BASELINE else "rival"
    return "recipe" if package_of(name) == "hasten" else "peer"


def scored_row(
    name: str,
    setting: Setting,
    score: Score,
    prompts: Sequence[Prompt],
    tried: int | None = None,
    notes: Iterable[str] = (),
) -> Row:
    """A measured setting, every prompt with its scores; tried: settings judged in its search."""
    values = zip(prompts, score.lpips, score.ssim, score.psnr, strict=True)
    per_prompt = [
        PromptQuality(id=prompt.id, lpips=round(lpips, 6), ssim=round(ssim, 6), psnr=round(psnr, 6))
        for prompt, lpips, ssim, psnr in values
    ]
    extra = {"evaluations": score.cost} | ({} if tried is None else {"settings tried": tried})
    return Row(
        recipe=name,
        role=_role_of(name),
        status="ok",
        notes=(_short(setting), *notes),
        steps_computed=StepsComputed(
            mean=statistics.mean(score.computed),
            min=math.floor(min(score.computed)),
            max=math.ceil(max(score.computed)),
        ),
        quality=(summarize_quality(BASELINE, per_prompt),),
        toml=_toml(name, setting),
        extra=extra,
    )


def failed_row(name: str, reason: str, *, unsupported: bool = False) -> Row:
    """A row without a measurement at a budget, and the reason."""
    status = "unsupported" if unsupported else "failed"
    return Row(recipe=name, role=_role_of(name), status=status, reason=reason)


def _toml(name: str, setting: Setting) -> str:
    """hasten's recipe, or another library's settings."""
    if "toml" in setting:
        return str(setting["toml"])
    if package_of(name) == "hasten" and "kind" in setting:
        return Recipe.from_dict({"cache": setting}).to_toml()
    return settings_toml(setting)


def setting_of(row: Row) -> Setting | None:
    """The setting that a measured row was made with."""
    if row.status != "ok" or row.toml is None:
        return None
    known = tomllib.loads(row.toml)
    if "settings" in known:
        return dict(known["settings"])
    if row.recipe in METHODS:
        return dict(known["cache"])
    return {"recipe": f"{known.get('name', row.recipe)}.toml", "toml": row.toml}


def _short(setting: Setting) -> str:
    """A setting in a note; the row's `toml` has all of it."""
    if "toml" in setting:
        return str(setting["recipe"])
    short = {name: value for name, value in setting.items() if not isinstance(value, list)}
    return ", ".join(f"{name} {value}" for name, value in short.items()) or "no settings"


def workload_of(
    model: str,
    prompts: Sequence[Prompt],
    source: str,
    *,
    steps: int = STEPS,
    side: int = SIZE["width"],
) -> Workload:
    """What every row renders."""
    arguments = MODELS[model]
    return Workload(
        model=model,
        width=side,
        height=side,
        steps=steps,
        guidance=arguments.get("guidance_scale", arguments.get("true_cfg_scale")),
        seed=0,
        dtype="float32",
        prompt_source=source,
        prompts=tuple(results.Prompt(id=one.id, text=one.text, seed=one.id) for one in prompts),
        max_sequence_length=SIZE["max_sequence_length"],
    )


def merged(
    workload: Workload, environment: Environment, rows: Iterable[Row], fresh: Iterable[Row]
) -> Results:
    """Results with `fresh` rows in the place of older ones of their names, unless nothing came of
    them: hasten's rows first, then fewer steps, then peers, the closest first."""
    steps = StepsComputed(mean=workload.steps, min=workload.steps, max=workload.steps)
    evaluations = {"evaluations": float(workload.steps)}
    baseline = Row(
        recipe=BASELINE, role="baseline", status="ok", steps_computed=steps, extra=evaluations
    )
    known = {row.recipe: row for row in rows} | {BASELINE: baseline}
    for row in fresh:
        older = known.get(row.recipe)
        if row.status == "ok" or older is None or older.status != "ok":
            known[row.recipe] = row
    caches = tuple(name for name, row in known.items() if row.role == "recipe")
    if PLAIN in known:
        known[PLAIN] = known[PLAIN].model_copy(update={"rival_of": caches})
    return with_speedups(workload, environment, sorted(known.values(), key=_place))


def _place(row: Row) -> tuple[int, bool, float, str]:
    quality = row.quality_against(BASELINE)
    lpips = quality.lpips if quality else None
    return ORDER[row.role], row.status != "ok", lpips or 0.0, row.recipe


def put(folder: Path, workload: Workload, environment: Environment, fresh: Iterable[Row]) -> None:
    """Add rows to the `results.json` of a folder."""
    path = folder / "results.json"
    rows = read_results(path).rows if path.is_file() else ()
    folder.mkdir(parents=True, exist_ok=True)
    write_results(path, merged(workload, environment, rows, fresh))
