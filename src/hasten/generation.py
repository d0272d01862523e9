"""Renders a request to an image, and saves it as a PNG that records the request.

This module does not print, so it is usable from commands and servers. It imports torch only when
an image is rendered.
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
    """Everything that determines the image, with options, recipe and model defaults resolved.

    Attributes:
        prompt: Text to render.
        model: Name or path of the model.
        recipe: How the pipeline is optimised.
        seed: Seed of the noise.
        settings: Size, steps, guidance and tokens.
    """

    prompt: str
    model: str
    recipe: Recipe
    seed: int
    settings: Settings

    def as_json(self) -> dict[str, Any]:
        """The request as JSON values, with the recipe's name instead of its content."""
        return {
            "prompt": self.prompt,
            "model": self.model,
            "recipe": self.recipe.name,
            "seed": self.seed,
            **vars(self.settings),
        }


@dataclass(frozen=True)
class Picture:
    """A rendered image.

    Attributes:
        image: The image, 8-bit RGB.
        seconds: Duration of the pipeline call and the conversion to 8 bits.
        steps: Number of steps of the run.
        steps_computed: How many of them the transformer computed.
        summary: What the recipe's passes did.
    """

    image: Image
    seconds: float
    steps: int
    steps_computed: int
    summary: str


def render(
    fast: OptimizedPipeline, request: Request, progress: Callable[[int], None] | None = None
) -> Picture:
    """Render one image.

    Args:
        fast: The request's model, optimised with the request's recipe.
        request: What to render.
        progress: Called after each step with the number of finished steps.

    Raises:
        ModelError: The pipeline fails, for example because of a damaged configuration, or the image
            has values that are not finite.
    """
    import numpy as np
    import torch
    from PIL import Image

    start = time.perf_counter()
    with _named_failures(request.model):
        pixels = fast(
            prompt=request.prompt,
            **request.settings.call_arguments(),
            # On the CPU: a seed gives the same noise on every device.
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
    """Write a PNG with its request as text chunks; no incomplete file can remain.

    Args:
        path: The file to create or replace.
        image: The image.
        request: The request that produced it.

    Raises:
        InputError: The file cannot be written.
    """
    content = png_bytes(image, request)
    with writing(path, "choose another --out"):
        write_bytes(path, content)


def png_bytes(image: Image, request: Request) -> bytes:
    """The bytes of a PNG with the text chunks `prompt`, `recipe` (TOML) and `hasten` (JSON).

    `hasten` has the request and the versions of the libraries.
    """
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
    """Turn errors of the libraries into a ModelError, except hasten's own and lack of memory."""
    try:
        yield
    except Exception as error:
        if isinstance(error, HastenError) or ran_out(error):
            raise
        raise ModelError(
            f"{model}: the pipeline failed: {type(error).__name__}: {error}",
            "try the recipe baseline: if it fails too, the model's files are damaged or do not "
            "belong together; otherwise report the output of --debug",
        ) from error


def step_callback(progress: Callable[[int], None] | None) -> Any:
    """A Diffusers `callback_on_step_end` that reports each finished step to `progress`."""

    def at_step_end(_pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        if progress is not None:
            progress(step + 1)
        return {}

    return at_step_end


def _not_finite(fast: OptimizedPipeline, request: Request) -> ModelError:
    """The error for an image with NaN or infinite pixels, with the cause if it is known."""
    fault = "the image has values that are not finite"
    if (weights := _first_not_finite(fast.pipe)) is not None:
        return ModelError(
            f"{request.model}: {fault}; so do its weights, first {weights}",
            "copy or download the model again; if that does not help, use another checkpoint",
        )
    fixes = ["use the recipe baseline to check whether the model itself works"]
    if isinstance(request.recipe.cache, ScheduleCache):
        fixes.insert(0, "remove weights from the recipe's [cache]")
    if "float16" in str(fast.pipe.dtype).split("."):  # overflows above 65504
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
