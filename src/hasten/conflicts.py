"""Sections of a recipe that exclude each other, and settings that a device type excludes."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.errors import Problem
from hasten.quantization.schemes import SCHEMES, why_no_row_scales
from hasten.recipe import Recipe, ResidualCache


def conflicts(recipe: Recipe, device_type: str) -> list[Problem]:
    """Every conflict within a recipe on a device of type "cpu", "cuda" or "mps". Needs no model."""
    return [
        *_engine(recipe),
        *_residual(recipe),
        *_attention(recipe, device_type),
        *_fuse(recipe),
        *_graphs(recipe, device_type),
        *_offload(recipe, device_type),
    ]


def why_no_kernels(recipe: Recipe) -> str | None:
    """Why the recipe's other sections rule out the fused kernels; None if they do not."""
    if recipe.compiles:
        return 'the blocks are compiled instead: compile.mode = "none" lets the kernels run'
    if recipe.offload and recipe.offload.kind == "model":
        return (
            'offload.kind = "model" moves weights that the kernels need in place: set '
            'offload.kind = "modulation"'
        )
    if recipe.quantize is None:
        return None
    if recipe.quantize.emulate:
        return "the kernels do not emulate: set quantize.emulate = false where that runs"
    if not SCHEMES[recipe.quantize.scheme].fused:
        return (
            f'there are kernels for "fp8" and "int8", none for "{recipe.quantize.scheme}": set '
            "quantize.scheme to one of them"
        )
    return why_no_row_scales(recipe.quantize.granularity, recipe.quantize.activations)


def why_no_graphs(recipe: Recipe, device_type: str) -> str | None:
    """Why `cuda_graphs = "auto"` records no graphs; None if it does."""
    if device_type != "cuda":
        return f"the pipeline is on {device_type}"
    if isinstance(recipe.cache, ResidualCache):
        return 'cache.kind = "residual" decides within a step'
    if recipe.offload and recipe.offload.kind == "model":
        return 'offload.kind = "model" moves the weights whose addresses a graph holds'
    return None


def _engine(recipe: Recipe) -> Iterator[Problem]:
    """An engine replaces all blocks, so no other section may change them or run between them."""
    if recipe.engine is None:
        return
    for name in ("quantize", "fuse", "attention", "compile"):
        if getattr(recipe, name) is not None:
            instead = " and set engine.precision" if name == "quantize" else ""
            yield Problem(
                f"[engine] replaces the torch blocks, and [{name}] changes them",
                f"remove [{name}]{instead}",
            )
    if isinstance(recipe.cache, ResidualCache):
        yield Problem(
            'cache.kind = "residual" decides between the blocks, and [engine] runs them as one',
            'use a planned cache, such as kind = "interval"',
        )
    if recipe.offload and recipe.offload.kind == "model":
        yield Problem(
            'offload.kind = "model" moves the transformer, which [engine] replaces',
            'set offload.kind = "modulation", and engine.release = true to free the blocks',
        )


def _residual(recipe: Recipe) -> Iterator[Problem]:
    """The residual cache decides between blocks, so no other section may merge them."""
    if not isinstance(recipe.cache, ResidualCache):
        return
    mode = recipe.compile.mode if recipe.compile else None
    graphs = recipe.compile.cuda_graphs if recipe.compile else None
    backend = recipe.attention.backend if recipe.attention else None
    for applies, setting, instead in (
        (mode == "full", 'compile.mode = "full"', 'set compile.mode = "blocks"'),
        (graphs == "on", 'compile.cuda_graphs = "on"', 'set compile.cuda_graphs = "auto"'),
        (recipe.fuse is not None, "[fuse]", "remove it"),
        (backend == "auto", 'attention.backend = "auto"', 'set attention.backend = "native"'),
    ):
        if applies:
            yield Problem(
                'cache.kind = "residual" decides between the blocks, and '
                f"{setting} runs them as one",
                f'{instead}, or use a planned cache, such as kind = "interval"',
            )


def _attention(recipe: Recipe, device_type: str) -> Iterator[Problem]:
    if recipe.attention is None:
        return
    backend = recipe.attention.backend
    if device_type != "cuda" and backend in ("cudnn", "flash", "efficient"):
        yield Problem(
            f'attention.backend = "{backend}" needs an NVIDIA GPU, and this is {device_type}',
            'set attention.backend = "native", or "auto"',
        )
    if backend == "auto" and recipe.compile and recipe.compile.mode == "full":
        yield Problem(
            'attention.backend = "auto" times the backends between calls, and '
            'compile.mode = "full" compiles the forward as one graph',
            'set attention.backend = "native" or "cudnn", or compile.mode = "blocks"',
        )


def _fuse(recipe: Recipe) -> Iterator[Problem]:
    if recipe.fuse is None:
        return
    if recipe.compile and recipe.compile.mode == "full":
        yield Problem(
            '[fuse] splits the transformer\'s forward, and compile.mode = "full" compiles it as '
            "one graph",
            'set compile.mode = "blocks", or "none" for the fused kernels',
        )
    reason = why_no_kernels(recipe)
    if recipe.fuse.kernels == "on" and reason:
        yield Problem(f'fuse.kernels = "on": {reason}', 'set fuse.kernels = "auto"')


def _graphs(recipe: Recipe, device_type: str) -> Iterator[Problem]:
    if recipe.compile is None or recipe.compile.cuda_graphs != "on":
        return
    if device_type != "cuda":
        yield Problem(
            f'compile.cuda_graphs = "on" needs an NVIDIA GPU, and this is {device_type}',
            'set cuda_graphs = "auto"',
        )
    if recipe.offload and recipe.offload.kind == "model":
        yield Problem(
            'CUDA graphs need fixed weight addresses, and offload.kind = "model" moves the weights',
            'set cuda_graphs = "auto", or offload.kind = "modulation"',
        )


def _offload(recipe: Recipe, device_type: str) -> Iterator[Problem]:
    if recipe.offload is None or recipe.offload.kind == "none":
        return
    if device_type == "cpu":
        yield Problem(
            f'offload.kind = "{recipe.offload.kind}" needs an accelerator to offload from, '
            "and this is the CPU",
            "remove [offload]: on a CPU the weights are already in host memory",
        )
    has_table = recipe.engine or (recipe.fuse is not None and recipe.fuse.conditioning)
    if recipe.offload.kind == "modulation" and not has_table:
        yield Problem(
            'offload.kind = "modulation" without the conditioning table would copy the weights '
            "to the device at every step",
            "add [fuse] with conditioning = true",
        )
