"""From a request to a picture, and to a PNG that says how to make it again.

Nothing here prints, so that it serves commands and servers alike. Torch loads when a picture is
drawn.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten import __version__
from hasten.atomic import write_bytes
from hasten.errors import HastenError, ModelError, writing
from hasten.machine import version_of
from hasten.memory import ran_out
from hasten.recipe import Recipe, ScheduleCache
from hasten.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from hasten.pipeline import OptimizedPipeline


@dataclass(frozen=True)
class Request:
    """Everything that decides the picture, resolved: options, then the recipe, then the model."""

    prompt: str
    model: str
    recipe: Recipe
    seed: int
    settings: Settings

    def as_json(self) -> dict[str, Any]:
        """The request as JSON values; the recipe by its name."""
        return {
            "prompt": self.prompt,
            "model": self.model,
            "recipe": self.recipe.name,
            "seed": self.seed,
            **vars(self.settings),
        }


@dataclass(frozen=True)
class Picture:
    """A rendered image, the time it took and what the recipe did."""

    image: Image
    seconds: float
    steps: int
    steps_computed: int
    summary: str


def render(
    fast: OptimizedPipeline, request: Request, progress: Callable[[int], None] | None = None
) -> Picture:
    """Draw one picture.

    Args:
        fast: The request's model under the request's recipe.
        request: What to draw.
        progress: Called after each step with the number of steps that are finished.

    Raises:
        ModelError: The pipeline fails, as with a damaged configuration, or the picture has values
            that are not finite.
    """
    import numpy as np
    import torch
    from PIL import Image

    start = time.perf_counter()
    with _named_failures(request.model):
        pixels = fast(
            prompt=request.prompt,
            **request.settings.call_arguments(),
            # On the CPU, so that a seed gives the same noise on every device.
            generator=torch.Generator().manual_seed(request.seed),
            callback_on_step_end=step_callback(progress),
            output_type="np",
        ).images[0]
    if not np.isfinite(pixels).all():
        raise _not_finite(fast, request)
    image = Image.fromarray((pixels * 255).round().astype("uint8"))  # as Diffusers does it
    seconds, run = time.perf_counter() - start, fast.last_run
    return Picture(image, seconds, run.steps, run.computed, fast.summary())


def save_png(path: Path, image: Image, request: Request) -> None:
    """Write a PNG that holds its request as text chunks; the file is whole or not there.

    Raises:
        InputError: The file cannot be written.
    """
    content = png_bytes(image, request)
    with writing(path, "choose another --out"):
        write_bytes(path, content)


def png_bytes(image: Image, request: Request) -> bytes:
    """A PNG with prompt, recipe and request (as JSON, with versions) as text chunks."""
    from PIL.PngImagePlugin import PngInfo

    versions = {name: version_of(name) for name in ("torch", "diffusers", "transformers")}
    facts = request.as_json() | {"versions": {"hasten": __version__, **versions}}
    info = PngInfo()
    info.add_itxt("prompt", request.prompt)
    info.add_itxt("hasten", json.dumps(facts))
    info.add_itxt("recipe", request.recipe.to_toml())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


@contextmanager
def _named_failures(model: str) -> Iterator[None]:
    """A ModelError for what the libraries raise; hasten's errors and lack of memory stay."""
    try:
        yield
    except Exception as error:
        if isinstance(error, HastenError) or ran_out(error):
            raise
        raise ModelError(
            f"{model}: the pipeline failed: {type(error).__name__}: {error}",
            "try the recipe baseline: where it fails too, the model's files are damaged or do not "
            "belong together; else report what --debug shows",
        ) from error


def step_callback(progress: Callable[[int], None] | None) -> Any:
    """A `callback_on_step_end` of Diffusers that reports each finished step and changes nothing."""

    def at_step_end(_pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        if progress is not None:
            progress(step + 1)
        return {}

    return at_step_end


def _not_finite(fast: OptimizedPipeline, request: Request) -> ModelError:
    """Why a picture has pixels that are NaN or infinite, as far as can be seen."""
    fault = "the picture has values that are not finite"
    if (weights := _first_not_finite(fast.pipe)) is not None:
        return ModelError(
            f"{request.model}: {fault}: so have its weights, first {weights}",
            "copy or download the model again; if it stays so, use another checkpoint",
        )
    fixes = ["use the recipe baseline to see whether the model itself draws a picture"]
    if isinstance(request.recipe.cache, ScheduleCache):
        fixes.insert(0, "remove weights from the recipe's [cache]")
    if "float16" in str(fast.pipe.dtype).split("."):  # its largest number is 65504
        fixes.insert(0, "use --dtype bfloat16 or float32")
    return ModelError(f"{request.model}: {fault}", "; or ".join(fixes))


def _first_not_finite(pipe: Any) -> str | None:
    """The first weight with a value that is not finite, by component and name."""
    import torch

    for component, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for name, weight in module.named_parameters():
            comparable = weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta
            if comparable and not weight.isfinite().all():
                return f"{component}.{name}"
    return None
