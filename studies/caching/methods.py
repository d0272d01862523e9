"""The methods under comparison: their settings, and how to apply them to a pipeline.

`apply(pipe, setting)` gets a pipeline nobody else uses (its own transformer and its own class, the
weights shared) and returns what to call in its place. A setting's `steps` is the number of
sampling steps of the call; everything else is the method's own vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "METHODS",
    "Knob",
    "Method",
    "UnsupportedError",
    "interval_settings",
    "recipe_method",
    "schedule_method",
]

Setting = dict[str, Any]
Item = TypeVar("Item")
STEPS = 50
MOST_PLANS = 16
"""Plans tried for one budget: a longer list is thinned evenly, for every method alike."""


class UnsupportedError(Exception):
    """This method cannot run on this model; the message explains why."""


@dataclass(frozen=True)
class Knob:
    """A threshold to search; larger values compute less. `static`: independent of the content."""

    name: str
    low: float
    high: float
    static: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    settings: candidates that compute (about) that many steps in full; with a `knob`, the settings
    to combine with its values, whatever the number. single: decides by content, so it gets one
    image at a time, as it would have in use. calibrate: the method's own calibration, from a
    pipeline and a function that runs it on the search prompts; what it returns joins each setting.
    """

    name: str
    package: str
    apply: Callable[[Any, Setting], Any]
    settings: Callable[[int], list[Setting]]
    knob: Knob | None = None
    single: bool = False
    calibrate: Callable[[Any, Callable[[Any], None]], Setting] | None = None
    note: str = ""


def _call(pipe: Any, setting: Setting) -> Any:
    return pipe


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


# --- hasten ---------------------------------------------------------------------------------------


def _apply_cache(pipe: Any, setting: Setting) -> Any:
    import hasten

    return hasten.optimize(pipe, hasten.Recipe.from_dict({"cache": setting}))


def interval_settings(computed: int, predictor: str, steps: int = STEPS) -> list[Setting]:
    """Starts and intervals, with the end step that makes exactly `computed` of `steps` steps
    computed."""
    found: dict[tuple[bool, ...], Setting] = {}
    for start, interval in product((0, 1, 2, 3, 4, 6, 8), range(2, 11)):
        for end in range(start, steps + 1):
            plan = tuple(
                step < start or (step - start) % interval == 0 or step >= end or step == 0
                for step in range(steps)
            )
            if sum(plan) == computed:
                setting = {"start_step": start, "interval": interval, "end_step": end}
                found.setdefault(plan, {"kind": "interval", **setting, "predictor": predictor})
    return thinned([*found.values()], MOST_PLANS)


def _apply_recipe(pipe: Any, setting: Setting) -> Any:
    import hasten

    return hasten.optimize(pipe, hasten.Recipe.from_toml(setting["toml"]))


def schedule_method(folders: Sequence[Path], stem: str, name: str = "schedule") -> Method:
    """A row of learned schedules: the files STEM-50-*.toml of the first folder that has any."""

    def settings(computed: int) -> list[Setting]:
        from hasten.recipe import ScheduleCache, read_recipe

        pattern = f"{stem}-{STEPS}-*.toml"
        found = [sorted(folder.glob(pattern)) for folder in folders]
        paths = next(filter(None, found), [])
        if not paths:
            raise UnsupportedError(f"no {pattern} in {', '.join(map(str, folders))}")
        recipes = {path.name: read_recipe(path) for path in paths}
        return [
            {"recipe": name, "toml": recipe.to_toml()}
            for name, recipe in recipes.items()
            if isinstance(recipe.cache, ScheduleCache) and len(recipe.cache.compute) == computed
        ]

    return Method(name, "hasten", _apply_recipe, settings)


def recipe_method(path: Path) -> Method:
    """A recipe file as a row; it has one setting, which serves the budgets it fits."""
    from hasten.recipe import read_recipe

    recipe = read_recipe(path)
    steps = recipe.sampling.steps if recipe.sampling else None
    setting = {"recipe": path.name, "toml": recipe.to_toml(), "steps": steps or STEPS}
    return Method(f"recipe:{path.name}", "hasten", _apply_recipe, lambda _: [setting])


# --- fewer steps, other solvers -------------------------------------------------------------------


def _flow_options(pipe: Any) -> dict[str, Any]:
    """What makes a diffusion solver of Diffusers follow this pipeline's sigmas.

    FluxPipeline passes a `mu` that these solvers turn into the shift exp(mu); base_shift and
    max_shift pin it to the model's own shift.
    """
    shift = pipe.scheduler.config.shift
    pinned = {"base_shift": math.log(shift), "max_shift": math.log(shift)}
    flow = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    return {**pinned, **flow}


def _apply_unipc(pipe: Any, setting: Setting) -> Any:
    from diffusers import UniPCMultistepScheduler

    own = {name: value for name, value in setting.items() if name != "steps"}
    options = _flow_options(pipe) | {"use_dynamic_shifting": False} | own
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **options)
    return pipe


def _apply_dpm(pipe: Any, setting: Setting) -> Any:
    from diffusers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler

    own = {name: value for name, value in setting.items() if name not in {"steps", "single"}}
    options = _flow_options(pipe) | {"use_dynamic_shifting": True} | own
    kind = DPMSolverSinglestepScheduler if setting.get("single") else DPMSolverMultistepScheduler
    # DPMSolverMultistepScheduler does not name base_shift: it must come with the other's config.
    pipe.scheduler = kind.from_config({**pipe.scheduler.config, **options})
    return pipe


def _unipc_settings(computed: int) -> list[Setting]:
    """With predict_x0 alone: the other way does not know flow_prediction (Diffusers 0.42)."""
    return [
        {"steps": computed, "solver_order": order, "solver_type": kind}
        for order, kind in product((2, 3, 1), ("bh2", "bh1"))
    ]


def _dpm_settings(computed: int) -> list[Setting]:
    multistep = [
        {"steps": computed, "algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
        for algorithm, order, kind in (
            ("dpmsolver++", 2, "midpoint"),
            ("dpmsolver++", 2, "heun"),
            ("dpmsolver++", 3, "midpoint"),
        )
    ]
    return [*multistep, {"steps": computed, "single": True, "solver_order": 2}]


def _refused_by_pipeline(scheduler: str, why: str) -> Callable[[Any, Setting], Any]:
    def apply(pipe: Any, setting: Setting) -> Any:
        raise UnsupportedError(f"FluxPipeline cannot drive {scheduler}: {why}")

    return apply


# --- Diffusers' caches ----------------------------------------------------------------------------


def _apply_first_block(pipe: Any, setting: Setting) -> Any:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(**setting))
    return pipe


def _apply_taylorseer(pipe: Any, setting: Setting) -> Any:
    import torch
    from diffusers import TaylorSeerCacheConfig

    own = dict(setting)
    if own.pop("cached") == "output":
        where: dict[str, Any] = {"use_lite_mode": True}
    else:
        where = {"cache_identifiers": [r"(single_)?transformer_blocks\.[0-9]+"]}
    config = TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **where, **own)
    pipe.transformer.enable_cache(config)
    return pipe


def taylorseer_settings(computed: int) -> list[Setting]:
    """Start, interval and end as for intervals; the cached module and the order besides."""
    plans: dict[tuple[bool, ...], tuple[int, int, int]] = {}
    for before, interval in product((2, 3, 4, 6), range(2, 9)):
        for after in range(before, STEPS + 1):
            plan = tuple(
                step < before or (step - before - 1) % interval == 0 or step >= after
                for step in range(STEPS)
            )
            if sum(plan) == computed:
                plans.setdefault(plan, (before, interval, after))
    return [
        {
            "cached": cached,
            "max_order": order,
            "disable_cache_before_step": before,
            "cache_interval": interval,
            "disable_cache_after_step": after,
        }
        for cached, order in (("output", 0), ("output", 1), ("output", 2), ("blocks", 1))
        for before, interval, after in thinned([*plans.values()], MOST_PLANS // 2)
    ]


def _apply_mag(pipe: Any, setting: Setting) -> Any:
    from diffusers import MagCacheConfig

    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=STEPS, **setting))
    return pipe


def _calibrate_mag(pipe: Any, run: Callable[[Any], None]) -> Setting:
    """MagCache prints its magnitude ratios, a list for each branch; their mean is used."""
    import ast
    import io
    from contextlib import redirect_stdout

    from diffusers import MagCacheConfig

    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    with redirect_stdout(io.StringIO()) as printed:
        run(pipe)
    lists = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line[:1] == "["
             and not line.startswith("[MagCache]")]  # fmt: skip
    return {"mag_ratios": [sum(column) / len(lists) for column in zip(*lists, strict=True)]}


def _apply_sea(pipe: Any, setting: Setting) -> Any:
    """SeaCache has no adapter for FLUX, and FluxPipeline tells its cache context no sigma.

    Both are given here by the means it documents: a callback that unpacks the latents to
    channels × 1 × height × width, and step, sigma and count in the cache context.
    """
    from diffusers import SeaCacheConfig

    transformer, scheduler = pipe.transformer, pipe.scheduler

    def latents(module: Any, args: Any, kwargs: Any) -> list[Any]:
        packed = args[0] if args else kwargs["hidden_states"]
        side = math.isqrt(packed.shape[1])
        grid = packed.unflatten(1, (side, side)).unflatten(3, (-1, 2, 2))
        unpacked = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return list(unpacked.unsqueeze(2))

    plain = transformer.cache_context

    @contextmanager
    def cache_context(name: str) -> Any:
        step = scheduler.step_index or 0
        where = {"step_index": step, "sigma": scheduler.sigmas[step].item()}
        with plain(name, **where, num_inference_steps=len(scheduler.timesteps)):
            yield

    transformer.cache_context = cache_context
    transformer.enable_cache(SeaCacheConfig(raw_vision_callback=latents, **setting))
    return pipe


def _sea_settings(_: int) -> list[Setting]:
    return [
        {"residual_order": order, "max_consecutive_cached": most, "retention_steps": first}
        for order, most, first in ((0, 0, 1), (1, 0, 1), (1, 2, 4))
    ]


# --- cache-dit ------------------------------------------------------------------------------------


def _apply_cache_dit(pipe: Any, setting: Setting) -> Any:
    try:
        import cache_dit
    except ImportError as error:
        raise UnsupportedError("cache-dit is not installed: see requirements.txt") from error

    own = dict(setting)
    calibrator = _calibrator(cache_dit, own.pop("calibrator", None))
    if "mask" in own:
        own["steps_computation_mask"] = [int(step) for step in own.pop("mask")]
        own |= {"steps_computation_policy": "static", "max_warmup_steps": 0}
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        num_inference_steps=STEPS,
        enable_separate_cfg=not pipe.transformer.config.guidance_embeds,
        **own,
    )
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
    return pipe


def _calibrator(cache_dit: Any, name: str | None) -> Any:
    if name is None:
        return None
    if name == "dmd":
        return cache_dit.DMDCalibratorConfig()
    return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=int(name.removeprefix("taylor")))


def _db_settings(calibrators: tuple[str | None, ...]) -> Callable[[int], list[Setting]]:
    limits = ((1, -1), (4, -1), (2, 4))
    return lambda _: [
        {"max_warmup_steps": first, "max_continuous_cached_steps": most, "calibrator": calibrator}
        for calibrator in calibrators
        for first, most in limits
    ]


def mask_settings(computed: int) -> list[Setting]:
    """Step masks as cache-dit's own policies draw them: a block of computed steps, then single
    ones ever (or evenly) farther apart, the last few computed."""
    masks = []
    for first, last, growth in product((2, 4, 6, 8), (1, 3), (1.0, 1.15)):
        singles = computed - first - last
        if singles < 0:
            continue
        gaps = [growth**index for index in range(singles + 1)]
        scale = (STEPS - first - last - singles) / sum(gaps)
        ends = [round(scale * sum(gaps[: index + 1])) for index in range(singles)]
        inner = {first + index + end for index, end in enumerate(ends)}
        keep = set(range(first)) | inner | set(range(STEPS - last, STEPS))
        mask = "".join(str(int(step in keep)) for step in range(STEPS))
        if len(keep) == computed and mask not in masks:
            masks.append(mask)
    return [
        {"mask": mask, "calibrator": calibrator}
        for calibrator in (None, "taylor1", "dmd")
        for mask in thinned(masks, MOST_PLANS // 2)
    ]


# --- the table ------------------------------------------------------------------------------------


def _hasten_methods() -> Iterator[Method]:
    for predictor in ("reuse", "linear"):
        settings = partial(interval_settings, predictor=predictor)
        yield Method(f"interval, {predictor}", "hasten", _apply_cache, settings)
    residual = [
        {"kind": "residual", "predictor": name, "warmup_steps": first, "max_consecutive": 1000}
        for name, first in product(("reuse", "linear", "damped"), (1, 4))
    ]
    knob = Knob("threshold", 0.003, 3)
    yield Method("residual", "hasten", _apply_cache, lambda _: residual, knob, single=True)


def _fewer_steps() -> Iterator[Method]:
    name = "fewer steps, {}".format
    yield Method(name("Euler"), "diffusers", _call, lambda computed: [{"steps": computed}])
    yield Method(name("UniPC"), "diffusers", _apply_unipc, _unipc_settings)
    yield Method(name("DPM++"), "diffusers", _apply_dpm, _dpm_settings)
    for scheduler, why in (
        ("FlowMatchHeunDiscreteScheduler", "its set_timesteps takes no sigmas"),
        ("IPNDMScheduler", "its set_timesteps takes no sigmas"),
        ("SASolverScheduler", "its set_timesteps takes no mu"),
        ("DEISMultistepScheduler", "it stops at the last sigma above 0 and leaves noise"),
    ):
        refuse = _refused_by_pipeline(scheduler, why)
        yield Method(name(scheduler), "diffusers", refuse, lambda _: [{}])


def _diffusers_caches() -> Iterator[Method]:
    knob = Knob("threshold", 0.003, 3)
    yield Method(
        "FirstBlockCache", "diffusers", _apply_first_block, lambda _: [{}], knob, single=True
    )
    yield Method("TaylorSeer", "diffusers", _apply_taylorseer, taylorseer_settings)
    magnitudes = [
        {"retention_ratio": first, "max_skip_steps": most}
        for first, most in product((0.04, 0.1, 0.2), (3, 9))
    ]
    knob = Knob("threshold", 0.001, 10, static=True)
    yield Method(
        "MagCache", "diffusers", _apply_mag, lambda _: magnitudes, knob, calibrate=_calibrate_mag
    )
    note = "with an adapter for FLUX written here: Diffusers has none"
    knob = Knob("threshold", 0.003, 10)
    yield Method("SeaCache", "diffusers", _apply_sea, _sea_settings, knob, single=True, note=note)


def _cache_dit_caches() -> Iterator[Method]:
    knob = Knob("residual_diff_threshold", 0.003, 0.99)
    for label, calibrators in (("", (None,)), (" + TaylorSeer", ("taylor1", "taylor2"))):
        settings = _db_settings(calibrators)
        name = f"DBCache{label}"
        yield Method(name, "cache-dit", _apply_cache_dit, settings, knob, single=True)
    yield Method("step masks", "cache-dit", _apply_cache_dit, mask_settings)


METHODS = {
    method.name: method
    for methods in (_hasten_methods, _fewer_steps, _diffusers_caches, _cache_dit_caches)
    for method in methods()
}
