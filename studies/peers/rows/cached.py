"""cache-dit with a static mask of computed steps, so that every row computes the same number.

On a skipped step it runs the first of FLUX's 57 blocks and adds a stored residual for the others;
that is the least it can be asked for.
"""

from __future__ import annotations

from typing import Any

from studies.peers.rows.applied import Applied, Unsupported
from studies.peers.rows.float8 import check_fp8, quantize_blocks
from studies.peers.rows.plain import COMPILE, compile_blocks, eager
from studies.peers.workload import Workload

__all__ = ["Mask", "cached_eager", "cached_fp8", "cached_own", "cached_untuned", "even_mask"]

CONFIG = {
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "max_warmup_steps": 0,
    "enable_separate_cfg": False,
    "steps_computation_policy": "static",
}


def cached_eager(pipe: Any, variants: str, workload: Workload) -> Applied:
    """DBCache alone."""
    plain = eager(pipe, "", workload)
    return _applied(pipe, variants, workload, plain.recipe)


def cached_fp8(pipe: Any, variants: str, workload: Workload) -> Applied:
    """DBCache over torchao's FP8, its inductor settings, and Diffusers' regional compilation."""
    return _cached_fp8(pipe, variants, workload, tuned=True)


def cached_untuned(pipe: Any, variants: str, workload: Workload) -> Applied:
    """The same with inductor's own settings."""
    return _cached_fp8(pipe, variants, workload, tuned=False)


def _cached_fp8(pipe: Any, variants: str, workload: Workload, *, tuned: bool) -> Applied:
    check_fp8(workload)
    quantized = quantize_blocks(pipe.transformer, tuned=tuned)
    recipe = {**eager(pipe, "", workload).recipe, **quantized}
    applied = _applied(pipe, variants, workload, recipe)
    recipe.update(compile_blocks(pipe.transformer))
    return applied


def cached_own(pipe: Any, variants: str, workload: Workload) -> Applied:
    """DBCache with cache-dit's own FP8 and compiler settings, as its guide has them."""
    import cache_dit

    check_fp8(workload)
    recipe = dict(eager(pipe, "", workload).recipe)
    applied = _applied(pipe, variants, workload, recipe)
    quantize = {"quant_type": "float8_per_row"}
    cache_dit.quantize(pipe.transformer, quantize_config=cache_dit.QuantizeConfig(**quantize))
    cache_dit.set_compile_configs()
    pipe.transformer.compile_repeated_blocks(**COMPILE)
    recipe.update(
        {
            "cache_dit.quantize": quantize,
            "cache_dit.set_compile_configs": "its defaults",
            "transformer.compile_repeated_blocks": COMPILE,
        }
    )
    return applied


def even_mask(steps: int, computed: int) -> list[int]:
    """1 for each of the `computed` steps, evenly spread from the first on, else 0."""
    if not 1 <= computed <= steps:
        raise Unsupported(f"{computed} of {steps} steps cannot be computed")
    keep = {index * steps // computed for index in range(computed)}
    return [int(step in keep) for step in range(steps)]


class Mask:
    """Puts cache-dit's cache on a pipeline, and exchanges its mask for another."""

    def __init__(self, pipe: Any, steps: int) -> None:
        self.pipe = pipe
        self.steps = steps
        self.cached = False

    def select(self, computed: str) -> None:
        """Compute so many steps from now on."""
        import cache_dit

        mask = even_mask(self.steps, int(computed))
        if self.cached:
            cache_dit.disable_cache(self.pipe)
        config = cache_dit.DBCacheConfig(
            num_inference_steps=self.steps, steps_computation_mask=mask, **CONFIG
        )
        cache_dit.enable_cache(self.pipe, cache_config=config)
        self.cached = True

    def computed(self) -> int:
        """Steps of the last call that ran all blocks, by cache-dit's own count."""
        import cache_dit

        stats = cache_dit.summary(self.pipe, logging=False)
        return self.steps - len(stats[0].cached_steps)


def _applied(pipe: Any, variants: str, workload: Workload, recipe: dict[str, Any]) -> Applied:
    """`recipe` may still grow after this."""
    mask = Mask(pipe, workload.steps)
    names = variants.split(",")
    masks = {name: "".join(map(str, even_mask(workload.steps, int(name)))) for name in names}
    mask.select(names[0])
    recipe.update({"cache_dit.DBCacheConfig": CONFIG, "steps_computation_mask": masks})
    return Applied(pipe, mask.computed, recipe, mask.select)
